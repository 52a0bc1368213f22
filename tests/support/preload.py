"""Imported once by the fork server: what every rank would otherwise do for itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

from deepspeed.comm.torch import build_shm_op
from torch.utils.cpp_extension import get_default_build_root

_STALE_SECONDS = 300  # building DeepSpeed's largest extension takes a minute


def _remove_stale_locks() -> None:
    """A process that is killed while it loads an extension leaves a lock, for which all later ones wait for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/lock"):
        if time.time() - lock.stat().st_mtime > _STALE_SECONDS:
            lock.unlink(missing_ok=True)


_remove_stale_locks()
# DeepSpeed keeps what is loaded in a table, which ranks inherit: they load nothing, and cannot leave a lock behind.
build_shm_op()
