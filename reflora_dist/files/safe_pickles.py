"""Files that are pickles by nature, read without running what they may hold.

A pickle names the classes and functions that it wants called. Those that checkpoints of DCP and DeepSpeed need are
listed here; a file that names any other is refused, with the name.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from .open_files import cause_of, readable
from .records import plain_name

_DTYPES = {("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_OF_DCP = {
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *_DTYPES,
}
# beyond what torch itself takes for safe
_OF_DEEPSPEED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


class RefusedPickleError(ValueError):
    """A pickle names something that no checkpoint needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _OF_DCP:
            raise RefusedPickleError(f"it wants {module}.{name} called, which no file of this kind needs")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader of a folder; its ``.metadata`` is unpickled with the classes that DCP itself writes, and no others.

    Args:
        path: the folder.
        trust_pickles: unpickle whatever there is.
    """

    def __init__(self, path: str | Path, trust_pickles: bool = False) -> None:
        super().__init__(path)
        self._trust_pickles = trust_pickles

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._trust_pickles:
            return super().read_metadata(*args, **kwargs)
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # whatever a damaged pickle ends in
            raise ValueError(_refusal(path, error)) from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} holds a {type(metadata).__name__} and no metadata: take another checkpoint")
        _require_places(metadata, path)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def _require_places(metadata: Metadata, path: Path) -> None:
    """A damaged pickle can put anything anywhere, and leave out what every such object has."""
    specs, places = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if isinstance(specs, dict) and isinstance(places, dict):
        kinds = (TensorStorageMetadata, BytesStorageMetadata)
        of_specs = all(isinstance(key, str) and isinstance(spec, kinds) for key, spec in specs.items())
        of_places = all(
            isinstance(index, MetadataIndex)
            and isinstance(place, _StorageInfo)
            and isinstance(getattr(place, "relative_path", None), str)
            and isinstance(getattr(place, "offset", None), int)
            and isinstance(getattr(place, "length", None), int)
            for index, place in places.items()
        )
        if of_specs and of_places:
            for place in places.values():
                plain_name(place.relative_path, path)
            return
    raise ValueError(f"{path} is damaged (what it says about the tensors is no such thing): take another checkpoint")


def load_states(path: Path, trust_pickles: bool = False) -> Any:
    """What is in a ``.pt`` file of DeepSpeed's or torch's, on the host, mapped from the file.

    Raises:
        ValueError: it names a class or function that these files do not need, or is damaged.
    """
    if trust_pickles:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    try:
        with _deepspeeds_classes():
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's, of many kinds; that of a refused name advises to switch the safety off
        raise ValueError(_refusal(path, error)) from error


def require_states(paths: Iterator[Path] | list[Path], trust_pickles: bool = False) -> None:
    """Make sure that files which a library unpickles by itself hold nothing but what :func:`load_states` takes.

    Raises:
        ValueError: as there.
    """
    if not trust_pickles:
        for path in paths:
            load_states(path)


def require_safe(file: BinaryIO) -> None:
    """Make sure that an open file of torch's holds nothing but what it takes for safe; it is at its beginning then.

    Raises:
        pickle.UnpicklingError: it does not.
    """
    torch.load(file, map_location="cpu", weights_only=True)
    file.seek(0)


def require_weights(path: Path) -> None:
    """Make sure that a ``.bin`` of a model, which a library unpickles by itself, can be read.

    Raises:
        ValueError: it cannot, or it holds more than tensors.
    """
    with readable(path, "it is damaged, or was changed to run code; get the model as safetensors"):
        torch.load(path, map_location="meta", weights_only=True)


@contextlib.contextmanager
def _deepspeeds_classes() -> Iterator[None]:
    allowed: list[Any] = [set]
    for module, name in _OF_DEEPSPEED:
        try:
            allowed.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):  # no DeepSpeed, or another release's names
            continue
    with torch.serialization.safe_globals(allowed):
        yield


def _refusal(path: Path, error: Exception) -> str:
    text = str(error) if isinstance(error, RefusedPickleError) else cause_of(error)
    return (
        f"{path} cannot be read ({text}): it is damaged, or was changed to run code; take it from where it was "
        "written, or, if you trust it, --trust_pickles (trust_pickles=True)"
    )
