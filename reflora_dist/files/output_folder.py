"""Output folders that exist either complete or not at all, written by one process."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_empty(folder: Path) -> None:
    """Refuse an output folder that is not empty, or that cannot be replaced.

    Raises:
        ValueError: the folder holds files, is no folder, or is a mount point.
    """
    if os.path.ismount(folder.resolve()):
        raise ValueError(f"{folder} is a mount point, which cannot be replaced: name a folder inside it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name another output folder, or remove it")


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse an output folder for which the disk has too little space.

    Raises:
        ValueError: fewer than ``num_bytes`` bytes are free.
    """
    parent = next(path for path in folder.resolve().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"{folder} needs {num_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free: name another folder"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Return a context with a new folder beside the target.

    At the end of the context the folder takes the target's name. If an exception is raised inside, it is removed.

    Args:
        target: the output folder; it must be empty or not exist. A link is kept, and its target is replaced.
    """
    target = target.resolve()  # so that a link is kept
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield part
        part.chmod(0o777 & ~_umask())  # mkdtemp creates a private folder
        os.rename(part, target)  # also replaces an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
