"""The record of merged adapters in a model's safetensors headers, which prevents merging an adapter twice."""

from __future__ import annotations

import hashlib
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..files.open_files import open_tensors

_KEY = "merged_adapters"


def merged_header(base: Path, adapter: Path) -> dict[str, str]:
    """Return the safetensors header entry for a model that is merged from a base and an adapter."""
    digests = [*_digests(base), *_digest(adapter)]
    return {_KEY: " ".join(digests)} if digests else {}


def refuse_merged_twice(base: str | Path, adapter: str | Path) -> None:
    """Refuse an adapter that is merged into the base already. Models merged by other tools have no record and pass.

    Raises:
        ValueError: the base contains the adapter.
    """
    digest = _digest(Path(adapter))
    if digest and digest[0] in _digests(Path(base)):
        raise ValueError(
            f"{base} is a model with this adapter ({adapter}) merged into it, which would count twice: give the base "
            "that it was merged into, or leave out the adapter"
        )


def _digests(folder: Path) -> list[str]:
    path = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    if path is None:
        return []
    with open_tensors(path) as file:
        return (file.metadata() or {}).get(_KEY, "").split()


def _digest(folder: Path) -> list[str]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        return [hashlib.file_digest(file, "sha256").hexdigest()]
