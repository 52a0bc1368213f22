"""Runs a benchmark's script on ranks of this machine, as a launcher would."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.cluster import run_ranks


def record_of(name: str, folder: Path, world_size: int, arguments: Sequence[str]) -> dict[str, Any]:
    """The record that ``benchmarks/<name>.py`` writes, into a folder that it has to make."""
    path = folder / "records" / "record.json"
    run_ranks(_main, world_size, name, [*arguments, "--output", str(path)], init_process_group=False)
    return json.loads(path.read_text())


def _main(rank: int, world_size: int, name: str, arguments: Sequence[str]) -> None:
    sys.argv = [f"benchmarks/{name}.py", *arguments]
    importlib.import_module(f"benchmarks.{name}").main()
