"""The commands that the wheel installs. Each runs a script of this folder, or the doctor, as ``python -m`` does."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
from pathlib import Path

from reflora_dist.command_line.help import HELP, HELP_ALL
from reflora_dist.command_line.name import Command, started_as

_EXTRA = "launchers"
_PACKAGE = "reflora_dist"
_LAUNCHERS = __name__.rpartition(".")[0]  # in a clone it is no part of the package


def train() -> None:
    """``reflora-train``: finetune.py."""
    _require_extra()
    _run(Command("reflora-train", "launchers.finetune", "launchers/finetune.py"))


def evaluate() -> None:
    """``reflora-eval``: evaluate.py."""
    _require_extra()
    _run(Command("reflora-eval", "launchers.evaluate", "launchers/evaluate.py"))


def export() -> None:
    """``reflora-export``: export.py."""
    _run(Command("reflora-export", "launchers.export", "launchers/export.py"))


def doctor() -> None:
    """``reflora-doctor``: ``python -m reflora_dist.doctor``."""
    _run(Command("reflora-doctor", "doctor"))


def _run(command: Command) -> None:
    started_as(command)
    folder, _, name = command.module.rpartition(".")
    module = f"{_LAUNCHERS if folder else _PACKAGE}.{name}"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _require_extra() -> None:
    """End the program with one line if a package of the extra is not installed. ``--help`` needs none."""
    if {*HELP, HELP_ALL} & set(sys.argv[1:]):
        return
    declared = importlib.metadata.requires("reflora_dist") or []
    wanted = [re.split(r"[^\w.-]", line)[0] for line in declared if f'extra == "{_EXTRA}"' in line]
    missing = [name for name in wanted if not _is_installed(name)]
    if missing:
        command = Path(sys.argv[0]).name
        raise SystemExit(f'{command}: error: {", ".join(missing)} missing: pip install "reflora_dist[{_EXTRA}]"')


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
