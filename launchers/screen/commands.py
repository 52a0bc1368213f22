"""The frame of a command: its beginning before the libraries are imported, and the error that ends it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from ..cluster.waiting import stage
from .foreign import filter_foreign
from .lines import LAUNCH_FOLDER, show_last

_SECONDS_FOR_THE_FIRST = 2.0
_importing = contextlib.ExitStack()


def begin_command() -> None:
    """Filter the libraries' lines, and say if importing them takes long. Call this before the imports."""
    filter_foreign()
    _importing.enter_context(stage("importing torch and transformers"))


def run_command(main: Callable[[], Any]) -> None:
    """Run a command's main function. If it ends with a message, show it once, and exit with code 1.

    Ranks mostly make the same mistake, and their launcher ends all of them after the first. So under a launcher that
    was started without our script the first rank of a machine speaks at once, and the others only if it does not.
    """
    _importing.close()
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        if LAUNCH_FOLDER not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_THE_FIRST)
        show_last(end.code, "error")
        sys.exit(1)
