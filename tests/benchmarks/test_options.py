"""What a benchmark's command line refuses: told in one line, whichever script it is."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.harness.options import parse
from benchmarks.overhead import Arguments

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
# one mistake each, and what names it
MISTAKES = {
    "attach_scale": ("--rank -1", "--rank -1 is none of 4096"),
    "convergence": ("--methods nope", "'nope' is unknown"),
    "cost_model": ("--models nope", "--models nope unknown"),
    "fsdp2_gathers": ("--lora_ranks 0", "--lora_ranks [0]"),
    "lora_sb_memory": ("--batches 0", "--batches 0 must be positive"),
    "matrix_factorization": ("--target 2", "target=2.0 must lie between 0 and 1"),
    "overhead": ("--backend mpi", "--backend mpi is unknown; choose one of gloo, nccl"),
    "report": ("--nope", "--nope"),
    "scaling": ("--shape nope", "--shape nope is unknown"),
    "shaped_link": ("--mbits -1", "--mbits [-1]"),
    "throughput": ("--peak_tflops 0", "--peak_tflops 0.0 must be positive"),
}


def test_every_script_has_a_mistake_here() -> None:
    runnable = {path.stem for path in SCRIPTS.glob("*.py") if "__main__" in path.read_text()}
    assert runnable - {"lora_sb_memory_ranks", "scaling_ranks"} == set(MISTAKES)  # those take a job, not options


@pytest.mark.parametrize("script", MISTAKES)
def test_a_mistake_is_one_line(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = MISTAKES[script]
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *options.split()])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{script}").main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_what_deepspeeds_launcher_adds_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/overhead.py", "--local_rank=0", "--steps", "3"])
    assert parse(Arguments).steps == 3
