"""Folders that are made once. They are written under a temporary name and renamed, so they are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def default_cache_dir() -> Path:
    """Return ``$REFLORA_CACHE``, or ``~/.cache/reflora_dist``."""
    return Path(os.environ.get("REFLORA_CACHE") or "~/.cache/reflora_dist").expanduser()


def build_once(
    cache_dir: Path, name: str, key: dict[str, Any], builder: Callable[[Path], None], *, build: bool = True
) -> Path:
    """Return the cached folder of ``name`` and ``key``. If it does not exist, ``builder`` fills it.

    Several jobs may build the same folder at once. The first that finishes is kept.

    Args:
        cache_dir: parent of all cached folders.
        name: readable beginning of the folder's name.
        key: everything that the content depends on; kept as ``key.json`` in the folder.
        builder: writes the content into an empty folder.
        build: False on ranks that only use what another rank built.

    Raises:
        ValueError: ``cache_dir`` is not writable.
        RuntimeError: the folder is missing and ``build`` is False.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    if not build:
        raise RuntimeError(f"{folder} is missing: the rank that makes it failed, and its message says why")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir))
    except OSError as error:
        raise ValueError(f"cache_dir={str(cache_dir)!r} is not writable ({error}); name another folder") from error
    try:
        builder(unfinished)
        (unfinished / "key.json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp made it private
        _rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _rename(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another job finished first, with the same result
            raise
