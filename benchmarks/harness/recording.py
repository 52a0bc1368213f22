"""Records of benchmarks: the measurements with hardware, versions and commit."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reflora_dist.algebra import kernels

RESULTS = Path(__file__).resolve().parents[1] / "results"


def provenance(device: torch.device) -> dict[str, Any]:
    """Return where a figure comes from: command, commit, versions, hardware, date."""
    # if its kernels do not work, the package uses plain torch code
    without_kernels = {"without_kernels": True} if device.type == "cuda" and not kernels.usable(device) else {}
    packages = ("torch", "transformers", "peft", "accelerate", "deepspeed", "triton", "reflora_dist")
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        **without_kernels,
    }


def hardware(device: torch.device) -> str:
    """Return the accelerator's name, or the number and kind of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the repository's commit, with a plus sign if the working tree differs from it."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=folder, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("REFLORA_COMMIT")
    return f"{commit}+" if changed else commit


def publish(
    benchmark: str,
    arguments: Any,
    device: torch.device,
    results: dict[str, Any],
    markdown: Callable[[dict[str, Any]], str],
    **changes: Any,
) -> None:
    """Print a benchmark's report and write its record to ``arguments.output``, if given, on the first rank.

    ``changes`` replace entries of the provenance, for scripts that start ranks of their own.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    record = {
        "benchmark": benchmark,
        **provenance(device),
        **changes,
        "arguments": dataclasses.asdict(arguments),
        "results": results,
    }
    print(markdown(record))
    if arguments.output is not None:
        write_json(arguments.output, record)


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record as JSON. Only the first rank calls this."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
