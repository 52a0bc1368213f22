"""Names that may be a path or a name on the hub: the hub is not asked for a mistyped path."""

from __future__ import annotations

import difflib
from pathlib import Path

# endings of files, which names on the hub do not have
_FILE_ENDINGS = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zip"}
_FILE_ENDINGS |= {".safetensors", ".bin", ".pt", ".yaml"}


def no_such_path(name: str) -> str | None:
    """Return what is wrong with a name that can only be a path and does not exist. Other names give None.

    A name that exists here, and one that the hub may have, give None. A name like ``outputs/rnu`` is a path if there is
    a folder ``outputs`` with something of nearly that name.
    """
    path = Path(name)
    if path.exists() or path.is_symlink() or not _is_path(name):
        return None
    return f"no such file or folder{hint_of(name)}"


def require_path_or_hub_name(what: str, name: str) -> None:
    """Refuse a path that does not exist.

    Args:
        what: what is named, for the message.
        name: a path, or a name on the hub.

    Raises:
        ValueError: the name can only be a path, and there is nothing at it.
    """
    problem = no_such_path(name)
    if problem:
        raise ValueError(f"{what} {name!r} cannot be loaded: {problem}")


def hint_of(name: str) -> str:
    """Return "; did you mean ...?" with the paths here that are spelled nearly like ``name``; empty without any."""
    path = Path(name)
    # the first part that does not exist is the mistyped one
    missing = next((part for part in [*reversed(path.parents), path] if not part.exists()), None)
    if missing is None:
        return ""
    try:
        present = sorted(entry.name for entry in missing.parent.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(missing.name, present, n=3, cutoff=0.7)
    found = [str(missing.parent / match / path.relative_to(missing)) for match in near]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _is_path(name: str) -> bool:
    if name.startswith((".", "/", "~")) or Path(name).suffix in _FILE_ENDINGS:
        return True
    from huggingface_hub.errors import HFValidationError  # help is answered where no package is installed
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    parts = Path(name).parts
    return len(parts) > 1 and Path(parts[0]).is_dir() and bool(hint_of(name))
