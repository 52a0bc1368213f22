"""Readers of pickles that run no code from the file.

A pickle names the classes and functions that unpickling calls. This module lists those that checkpoints of DCP and
DeepSpeed need, and refuses a file that names any other.
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
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
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
# in addition to the classes that torch itself considers safe
_OF_DEEPSPEED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


class RefusedPickleError(ValueError):
    """A pickle names a class or function that no checkpoint needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _OF_DCP:
            raise RefusedPickleError(f"it wants {module}.{name} called, which no file of this kind needs")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, restricted to ``.metadata`` files with the classes that DCP itself writes.

    Args:
        path: the checkpoint's folder.
        trust_pickles: whether to unpickle without this restriction.

    Raises:
        ValueError: from ``read_metadata``, if ``.metadata`` is damaged or names another class.
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
        except Exception as error:  # a damaged pickle raises errors of any type
            raise ValueError(_refusal(path, error)) from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} holds a {type(metadata).__name__} instead of metadata: take another checkpoint")
        _require_places(metadata, path)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def _require_places(metadata: Metadata, path: Path) -> None:
    """Refuse metadata with fields of other types, since a damaged pickle may hold any value or lack any attribute.

    Raises:
        ValueError: a field is missing or of another type, or a file name leads out of the folder.
    """
    specs, places = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if isinstance(specs, dict) and isinstance(places, dict):
        of_specs = all(isinstance(key, str) and _is_spec(spec) for key, spec in specs.items())
        of_places = all(
            _has(index, MetadataIndex, fqn=str, offset=(torch.Size, type(None)), index=(int, type(None)))
            and _has(place, _StorageInfo, relative_path=str, offset=int, length=int)
            for index, place in places.items()
        )
        if of_specs and of_places:
            for place in places.values():
                plain_name(place.relative_path, path)
            return
    raise ValueError(
        f"{path} is damaged (a field of its metadata is missing or of another type): take another checkpoint"
    )


def _is_spec(spec: object) -> bool:
    """Return whether an entry of a state dictionary's metadata has all fields that reading it takes."""
    if isinstance(spec, BytesStorageMetadata):
        return True
    return (
        _has(spec, TensorStorageMetadata, properties=TensorProperties, size=torch.Size, chunks=list)
        and _has(spec.properties, TensorProperties, dtype=torch.dtype)  # type: ignore[attr-defined]
        and all(_has(chunk, ChunkStorageMetadata, offsets=torch.Size, sizes=torch.Size) for chunk in spec.chunks)  # type: ignore[attr-defined]
    )


def _has(value: object, kind: type, **fields: type | tuple[type, ...]) -> bool:
    """Return whether a value is of a class, and its fields of theirs."""
    return isinstance(value, kind) and all(isinstance(getattr(value, n, None), types) for n, types in fields.items())


def load_states(path: Path, trust_pickles: bool = False) -> Any:
    """Return the content of a ``.pt`` file of DeepSpeed or torch, on the host, memory-mapped.

    Args:
        path: the file.
        trust_pickles: whether to unpickle any class.

    Raises:
        ValueError: the file is damaged, or names a class or function that such files do not need.
    """
    if trust_pickles:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    try:
        with _deepspeeds_classes():
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many types; its message on a refused name advises to switch the check off
        raise ValueError(_refusal(path, error)) from error


def require_states(paths: Iterator[Path] | list[Path], trust_pickles: bool = False) -> None:
    """Refuse files that :func:`load_states` would refuse, before a library unpickles them by itself.

    Raises:
        ValueError: a file is damaged, or names a class or function that such files do not need.
    """
    if not trust_pickles:
        for path in paths:
            load_states(path)


def require_safe(file: BinaryIO) -> None:
    """Refuse an open file of ``torch.save`` with classes that torch does not consider safe; else rewind the file.

    Raises:
        pickle.UnpicklingError: the file names another class or function.
    """
    torch.load(file, map_location="cpu", weights_only=True)
    file.seek(0)


def require_weights(path: Path) -> None:
    """Refuse a model's ``.bin`` file that is damaged or unsafe, before a library unpickles it by itself.

    Raises:
        ValueError: the file cannot be read, or names a class that torch does not consider safe.
    """
    with readable(path, "it is damaged, or was changed to run code; get the model as safetensors"):
        torch.load(path, map_location="meta", weights_only=True)


@contextlib.contextmanager
def _deepspeeds_classes() -> Iterator[None]:
    allowed: list[Any] = [set]
    for module, name in _OF_DEEPSPEED:
        try:
            allowed.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):  # no DeepSpeed, or a release with other names
            continue
    with torch.serialization.safe_globals(allowed):
        yield


def _refusal(path: Path, error: Exception) -> str:
    text = str(error) if isinstance(error, RefusedPickleError) else cause_of(error)
    return (
        f"{path} cannot be read ({text}): it is damaged, or was changed to run code; take it from where it was "
        "written, or, if you trust it, --trust_pickles (trust_pickles=True)"
    )
