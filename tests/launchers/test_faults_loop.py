"""Faults in a training loop of one's own, with nothing but `attach`, `save_checkpoint` and `load_checkpoint`.

The loop saves over its last checkpoint, and the fault comes while there is one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cluster import run_ranks
from tests.support.faulty import loop
from tests.support.launched import launched
from tests.support.launchers import REPOSITORY
from tests.support.workloads import Factors

LIMIT = 60.0  # seconds from the fault until no process is left
# kind, step, steps in the checkpoint that is left (None: the fault comes before any), what the output must say
FAULTS: list[tuple[str, int, int | None, str]] = [
    ("kill", 3, 2, "Signal 9 (SIGKILL)"),
    ("raise", 3, 2, "MemoryError: out of memory (a test's)"),
    ("full", 4, 2, "failed on rank {rank}: "),
    ("attach-raise", 0, None, "attach failed on rank {rank}: MemoryError: out of memory (a test's)"),
    ("attach-kill", 0, None, "Signal 9 (SIGKILL)"),
]
SAMPLED = {("fsdp2", "kill", 1)}


def _run(engine: str, folder: Path, kind: str, rank: int, step: int) -> tuple[int, str]:
    """Run the loop on two ranks; its exit code and output, once all its processes are gone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(REPOSITORY / "tests" / "support" / "faulty" / "loop.py"),
        engine,
        str(folder),
        kind,
        str(rank),
        str(step),
    ]
    with launched(command, folder / "job") as job:
        job.seconds_to_the_end(LIMIT)
        return job.launcher.returncode, job.output()


def _run_to_the_end(engine: str, folder: Path) -> Factors:
    """The loop without a fault, in processes that start faster than a launcher's."""
    run_ranks(_loop, 2, engine, str(folder), init_process_group=False)
    return torch.load(folder / "factors.pt")


def _loop(rank: int, world_size: int, engine: str, folder: str) -> None:
    loop.main(engine, Path(folder), "none", 0, 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The factors of the run that is left alone, by engine."""
    finished: dict[str, Factors] = {}

    def factors(engine: str) -> Factors:
        if engine not in finished:
            finished[engine] = _run_to_the_end(engine, tmp_path_factory.mktemp(engine))
        return finished[engine]

    return factors


def _cases() -> Iterator[Any]:
    for engine in ("fsdp2", "zero3", "fsdp1-full"):
        for fault in FAULTS:
            for rank in (0, 1):
                marks = [] if (engine, fault[0], rank) in SAMPLED else [pytest.mark.all_ranks]
                yield pytest.param(engine, *fault, rank, marks=marks, id=f"{engine}-{fault[0]}-rank{rank}")


@pytest.mark.parametrize(("engine", "kind", "step", "left", "message", "rank"), _cases())
def test_a_loop_that_fails_ends_in_time_and_resumes(
    tmp_path: Path, whole: Any, engine: str, kind: str, step: int, left: int | None, message: str, rank: int
) -> None:
    """All processes are gone in time; the checkpoint that the failed save should have replaced is still there and
    whole, and continued from it, or from the start, the run ends bit-equal to the one that was left alone.
    """
    code, printed = _run(engine, tmp_path, kind, rank, step)
    assert code != 0
    assert message.format(rank=rank) in printed, printed
    # the first rank fails at the adapter already, whose error speaks for itself; torch's of a state does not
    assert "MiB free there" in printed or kind != "full" or rank == 0, printed
    assert f"rank      : {rank} (local_rank: {rank})" in printed, printed
    record = tmp_path / "checkpoint" / "reflora.json"
    assert (json.loads(record.read_text())["handle"]["steps"] if record.exists() else None) == left
    resumed = _run_to_the_end(engine, tmp_path)
    assert all(torch.equal(resumed[name], factor) for name, factor in whole(engine).items())
