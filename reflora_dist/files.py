"""Files of a checkpoint: written such that they are there whole or not at all, and compared by size."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a file that other files' completeness rests on: on the disk, then under its name."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under a folder, by its name relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def require_files(folder: str | Path, sizes: Mapping[str, int]) -> None:
    """Compare a folder with the sizes that its files had.

    Raises:
        ValueError: a file is missing or has another size.
    """
    for name, size in sizes.items():
        path = Path(folder) / name
        present = path.stat().st_size if path.is_file() else None
        if present != size:
            state = "is missing" if present is None else f"has {present} bytes instead of {size}"
            raise ValueError(f"{path} {state}: the checkpoint is damaged; load an earlier one")


def require_zip(path: Path) -> None:
    """torch's files end with their directory: without it they are cut off."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is damaged; take an earlier one")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated: the checkpoint is damaged; take an earlier one")
