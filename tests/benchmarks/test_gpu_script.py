"""The script that takes all records of a GPU, with a stand-in for its interpreter."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from benchmarks import overhead, throughput
from tests.support.launchers import REPOSITORY


def _stub_interpreter(folder: Path, body: str) -> Path:
    """An interpreter that claims to see a GPU, notes what it is asked to run, and does ``body`` instead."""
    stub = folder / "python"
    stub.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then echo "NVIDIA H100 80GB HBM3"; exit 0; fi\n'
        f'echo "$@" >> "{folder}/calls"\n{body}\n'
    )
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return stub


def _gpu_script(folder: Path, body: str, **environment: str) -> tuple[Any, list[list[str]]]:
    """The finished script, and the words of every command that it gave the interpreter."""
    stub = _stub_interpreter(folder, body)
    done = subprocess.run(
        ["bash", REPOSITORY / "benchmarks" / "gpu.sh", str(folder / "records")],
        env={**os.environ, "PYTHON": str(stub), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = folder / "calls"
    return done, [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []


def test_the_gpu_script_goes_on_after_a_failure_and_tells(tmp_path: Path) -> None:
    done, calls = _gpu_script(tmp_path, 'case "$*" in *throughput/7b_*) exit 3;; esac')
    assert done.returncode == 1 and "failed: throughput 7b (exit code 3)" in done.stderr
    assert len(calls) == 11


def test_what_the_gpu_script_asks_for_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, calls = _gpu_script(tmp_path, "exit 0")
    assert done.returncode == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    names = []
    for words in (call for call in calls if "pytest" not in call):
        script = next(index for index, word in enumerate(words) if word.startswith("benchmarks/"))
        module = {"overhead": overhead, "throughput": throughput}[Path(words[script]).stem]
        (parsed,) = HfArgumentParser(module.Arguments).parse_args_into_dataclasses(words[script + 1 :])
        names.append(Path(parsed.output).relative_to(tmp_path / "records"))
    assert len(set(names)) == len(names) == 10
    assert all(name.parts[0] in ("overhead", "throughput") and "_h100_20" in name.name for name in names)


def test_the_gpu_script_ends_in_time(tmp_path: Path) -> None:
    start = time.monotonic()
    done, calls = _gpu_script(tmp_path, "exec sleep 60", SECONDS_IN_ALL="6")
    assert time.monotonic() - start < 30
    assert done.returncode == 1 and "no time left" in done.stderr and len(calls) == 1
