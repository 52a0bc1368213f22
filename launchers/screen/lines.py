"""Lines on stderr, in colour on a terminal, and what ended a run as its last line.

The script that starts a launcher (``launchers/cluster/launch.py``) makes a folder for all ranks of its machine. What is
shown once is claimed there by the first rank that has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path

from reflora_dist.command_line.name import in_own_words

LAUNCH_FOLDER = "REFLORA_LAUNCH_FOLDER"
_LAST_LINE = "last_line"
_STYLES = {"error": "bold red", "warning": "yellow"}


def show(text: str, kind: str = "") -> None:
    """Print a text on stderr.

    Args:
        text: the text; a line, as a rule.
        kind: "error" or "warning" for the colour; empty for none.
    """
    text = in_own_words(text)
    if kind in _STYLES and sys.stderr.isatty():
        from rich.console import Console  # not before a terminal needs it

        Console(stderr=True).print(text, style=_STYLES[kind], markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def show_last(text: str, kind: str = "") -> bool:
    """Show what ended the run: below the launcher's own report if there is one, else at once.

    Of the ranks of a machine only the first that calls is shown below a launcher's report.

    Returns:
        Whether it is, or will be, shown.
    """
    text = in_own_words(text)
    folder = os.environ.get(LAUNCH_FOLDER)
    if folder is None:
        show(text, kind)
        return True
    try:
        with open(Path(folder) / _LAST_LINE, "x", encoding="utf-8") as file:
            file.write(f"{kind}\n{text}")
    except FileExistsError:
        return False
    except OSError:  # the launcher has ended already, or the disk is full
        show(text, kind)
    return True


def left_for_last(folder: Path) -> tuple[str, str] | None:
    """Return text and kind of what :func:`show_last` left in a folder; None if no rank left anything."""
    with contextlib.suppress(FileNotFoundError):
        kind, _, text = (folder / _LAST_LINE).read_text(encoding="utf-8").partition("\n")
        return (text, kind) if text else None  # a rank may have been killed while it wrote
    return None


def is_first_with(text: str) -> bool:
    """Return whether no other rank of this machine has asked with this text. Without a launch script always True."""
    folder = os.environ.get(LAUNCH_FOLDER)
    if folder is None:
        return True
    claim = Path(folder) / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than never
        return True
    return True
