"""Folders that are there whole or not at all. No ranks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_empty(folder: Path) -> None:
    """Raises ValueError if there is anything that would be overwritten, or no folder can take this one's place."""
    if os.path.ismount(folder.resolve()):
        raise ValueError(f"{folder} is a mount point, which cannot be replaced: name a folder inside it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name another output folder, or remove it")


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises ValueError if a new folder of this size does not fit."""
    parent = next(path for path in folder.resolve().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"{folder} needs {num_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free: name another folder"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, which takes its name when all is written, and goes if anything fails."""
    target = target.resolve()  # a link stays, and leads to the new folder
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield part
        part.chmod(0o777 & ~_umask())  # mkdtemp's is private
        os.rename(part, target)  # onto an empty folder too
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
