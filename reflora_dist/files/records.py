"""Records of a checkpoint: written atomically, checked field by field, and compared with the files' sizes."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .open_files import read_json


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically.

    Such a file marks other files as complete, so it gets its name only after its content is on the disk.
    """
    part = path.with_name(f"{path.name}.part")
    with open(part, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def plain_name(name: Any, source: Path, *, with_folders: bool = False) -> str:
    """Return a file name that was read from a file, if it stays inside the folder that it is used in.

    Args:
        name: the value that was read.
        source: the file that it was read from, for the message.
        with_folders: whether the name may lead into subfolders.

    Raises:
        ValueError: the value is no string, or could lead out of the folder.
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
    """Refuse a record that lacks a field, or has a field of another type.

    Args:
        content: the record as it was read from a file.
        kinds: the type of every field, as for isinstance; True and False are never accepted.
        source: the file of the record, for the message.
        remedy: the end of the message.

    Raises:
        ValueError: the record is no mapping, or a field is missing or of another type.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} is damaged (it holds {content!r:.60}, no fields): {remedy}")
    for name, kind in kinds.items():
        value = content.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = f"{name} is {value!r:.60}" if name in content else f"{name} is missing"
            raise ValueError(f"{source} is damaged ({found}): {remedy}")


def read_record(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a checkpoint, which is written last and lists the checkpoint's files with their sizes.

    Args:
        path: the record's file, which must exist.
        kinds: the types of its fields other than ``files``, as for :func:`require_fields`.

    Raises:
        ValueError: the record is no JSON object, or a field is missing or of another type.
    """
    record = read_json(path, "it is damaged, load an earlier checkpoint")
    require_fields(record, {**kinds, "files": Mapping}, path)
    require_fields(record["files"], dict.fromkeys(record["files"], int), f"{path}, files")
    return record


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by the path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def require_files(folder: str | Path, sizes: Mapping[str, int]) -> None:
    """Refuse a folder whose files do not have the recorded sizes.

    Args:
        folder: the checkpoint's folder.
        sizes: bytes of every file, by the path relative to the folder.

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
    """Refuse a file of ``torch.save`` that is missing or cut off: it is a zip archive, whose directory comes last.

    Raises:
        ValueError: the file is missing or truncated.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is damaged; take an earlier one")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated: the checkpoint is damaged; take an earlier one")
