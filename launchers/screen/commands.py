"""The frame of a command: the error that ends it is the last line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from .lines import LAUNCH_FOLDER, show_last

_SECONDS_FOR_THE_FIRST = 2.0


def run_command(main: Callable[[], Any]) -> None:
    """Run a command's main function. If it ends with a message, show it once, and exit with code 1.

    Ranks mostly make the same mistake, and their launcher ends all of them after the first. So under a launcher that
    was started without our script the first rank of a machine speaks at once, and the others only if it does not.
    """
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        if LAUNCH_FOLDER not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_THE_FIRST)
        show_last(end.code, "error")
        sys.exit(1)
