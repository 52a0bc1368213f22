"""Readers and a writer of a model's safetensors files that keep one tensor in memory at a time.

The safetensors library's own writer takes all tensors of a file at once, which may be a whole model. The library reads
the files that this module writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from .local_names import hint_of, require_path_or_hub_name
from .open_files import GET_ANEW, cause_of, open_tensors, read_json
from .records import plain_name

INDEX_NAME = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
# files to download for a merged model; other formats of the same weights are left out
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file to write.

    Attributes:
        key: name of the tensor in the file.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        load: returns the tensor on the host; called right before the tensor is written.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class StoredWeights:
    """The tensors in the safetensors files of a model's folder, by key. No tensor is kept in memory.

    Args:
        folder: the model's folder.

    Attributes:
        folder: the model's folder.
        keys: the keys in every file, by the file's name.
        index: the content of ``model.safetensors.index.json``; None if the weights are in ``model.safetensors``.
        specs: shape and dtype of every tensor, by key.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a tensor has an unknown dtype.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        self.keys: dict[str, list[str]] = {}
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._files: dict[str, Path] = {}
        for path in weight_files(folder):
            self._scan(path)

    def _scan(self, path: Path) -> None:
        with open_tensors(path) as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
            specs = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        for key, (shape, code) in specs.items():
            if code not in _DTYPES:
                raise ValueError(f"{path}: {key} is stored as {code}, which is not supported; choose another base")
            self.specs[key] = (shape, _DTYPES[code])
            self._files[key] = path
        self.keys[path.name] = list(specs)

    def read(self, key: str) -> Tensor:
        """Return a tensor, memory-mapped: copy it before any change.

        The file is unmapped with the last reference to the tensor.
        """
        with open_tensors(self._files[key]) as file:
            return file.get_tensor(key)

    def metadata(self, name: str) -> dict[str, str]:
        """Return the metadata in the header of the file ``name``."""
        with open_tensors(self.folder / name) as file:
            return dict(file.metadata() or {})


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of a model's safetensors files.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        ValueError: the index is damaged.
    """
    index = _read_index(folder)
    names = [_ONE_FILE] if index is None else sorted(set(index["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, which {INDEX_NAME} names: download the model again")
    return [folder / name for name in names]


def find_model(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model; a model of the hub is downloaded, or found in the hub's cache.

    Args:
        name: folder, or name on the hub.
        revision: branch, tag or commit on the hub; by default the main branch.

    Raises:
        ValueError: the model cannot be found or downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    require_path_or_hub_name("model", name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises a dozen types; all mean that there is no model
        raise ValueError(
            f"model {name!r} is no local folder and cannot be had from the hub ({cause_of(error)}){hint_of(name)}"
        ) from error


def write_file(path: Path, entries: Sequence[Entry], metadata: dict[str, str], done: Callable[[int], Any]) -> None:
    """Write a safetensors file, with one tensor in memory at a time.

    The format is the header's length (8 bytes, little endian), the header (JSON: dtype, shape and byte range of each
    tensor), and the tensors without gaps. Tensors with wider elements come first, as in the library's files, so that
    all are aligned.

    Args:
        path: the new file.
        entries: the tensors to write.
        metadata: metadata for the header; left out if empty.
        done: called after each tensor with the tensor's number of bytes.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.num_bytes
        header[entry.key] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in ordered:
            tensor = entry.load()
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry.key
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
            done(entry.num_bytes)


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX_NAME
    if (folder / _ONE_FILE).is_file():  # transformers takes it where both are there: an index may be left over
        return None
    if path.is_file():
        index = read_json(path)
        for field in ("weight_map", "metadata"):
            if not isinstance(index.get(field, {}), dict):
                raise ValueError(f"{path} holds {field} as {index[field]!r:.40} where an object is wanted: {GET_ANEW}")
        names = list(index.get("weight_map", {}).values())
        if not names:
            raise ValueError(f"{path} names no file: {GET_ANEW}")
        for name in names:
            if not plain_name(name, path).endswith(".safetensors"):
                raise ValueError(f"{path} names {name!r} among the weights, which is no safetensors file: get it anew")
        return index
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    remedy = "name another folder, or download the model again"
    if others:
        remedy = f"it has {others[0]}; AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) rewrites it"
    raise FileNotFoundError(f"{folder} holds no {_ONE_FILE} and no {INDEX_NAME}: {remedy}")
