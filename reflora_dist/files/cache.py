"""Folders that are made once. They are written under a temporary name and renamed, so they are complete or absent.

What fills a folder may need a process of its own, for which ``environment_of_one_process`` gives the variables.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# With a launcher's variables a process that fills a folder would join the job's process group, and hang in it.
_DISTRIBUTED_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"}
    | {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
)
_DISTRIBUTED_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PMI_", "OMPI_")
KEY_FILE = "key.json"


def default_cache_dir() -> Path:
    """Return ``$REFLORA_CACHE``, or ``~/.cache/reflora_dist``; for a user without a home a temporary folder."""
    try:
        return Path(os.environ.get("REFLORA_CACHE") or "~/.cache/reflora_dist").expanduser()
    except RuntimeError:  # no HOME and no such user, as in containers that run under any number
        return Path(tempfile.gettempdir()) / f"reflora_dist-{os.getuid()}"


def environment_of_one_process() -> dict[str, str]:
    """Return this process's environment without the launcher's part, for one device and all allowed cores."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _DISTRIBUTED_VARIABLES and not name.startswith(_DISTRIBUTED_PREFIXES)
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment["OMP_NUM_THREADS"] = str(min(cores, 8))  # more threads do not help small models
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow where cores are shared
    environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return environment


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
    if (folder / KEY_FILE).is_file():
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
        (unfinished / KEY_FILE).write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp made it private
        if folder.is_dir() and not (folder / KEY_FILE).is_file():
            shutil.rmtree(folder)  # something has removed files from it, as cleaners of old files do
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
