"""Files of a checkpoint: written such that they are there whole or not at all, and compared by size."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .open_files import read_json


def write_json(path: Path, content: Any) -> None:
    """Write a file that other files' completeness rests on: on the disk, then under its name."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def plain_name(name: Any, source: Path, *, with_folders: bool = False) -> str:
    """A name that was read from a file, to be used below a folder.

    Args:
        name: as it was read.
        source: the file, for the error.
        with_folders: whether it may name a file in a folder below.

    Raises:
        ValueError: it is no text, or could lead out of the folder.
    """
    parts = name.split("/") if isinstance(name, str) and with_folders else [name]
    for part in parts:
        if not isinstance(part, str) or part in ("", ".", "..") or any(c in part for c in ("/", "\\", "\0", ":")):
            raise ValueError(
                f"{source} names the file {name!r:.100}, which is no plain name inside its folder: the file is damaged "
                "or was made to write elsewhere; get it anew"
            )
    return name


def require_fields(
    content: Any, kinds: Mapping[str, Any], source: str | Path, remedy: str = "load an earlier checkpoint"
) -> None:
    """Make sure that a record, which was read from a file, holds what is going to be used.

    Args:
        content: as it was read.
        kinds: of every field, as for isinstance; True and False are no numbers.
        source: of the record, for the error.
        remedy: likewise.

    Raises:
        ValueError: it is no mapping, or a field is missing or of another kind.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} is damaged (it holds {content!r:.60}, no fields): {remedy}")
    for name, kind in kinds.items():
        value = content.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = f"{name} is {value!r:.60}" if name in content else f"{name} is missing"
            raise ValueError(f"{source} is damaged ({found}): {remedy}")


def read_record(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A record that is written last and lists a checkpoint's files with their sizes.

    Args:
        path: of the record, which is there.
        kinds: of what else it holds, as for :func:`require_fields`.

    Raises:
        ValueError: it is no JSON, or does not hold what it has to.
    """
    record = read_json(path, "it is damaged, load an earlier checkpoint")
    require_fields(record, {**kinds, "files": Mapping}, path)
    require_fields(record["files"], dict.fromkeys(record["files"], int), f"{path}, files")
    return record


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under a folder, by its name relative to it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def require_files(folder: str | Path, sizes: Mapping[str, int]) -> None:
    """Compare a folder with the sizes that its files had.

    Raises:
        ValueError: a file is missing or has another size, or a name leads out of the folder.
    """
    for name, size in sizes.items():
        path = Path(folder) / plain_name(name, Path(folder), with_folders=True)
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
