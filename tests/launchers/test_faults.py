"""What a user gets when something fails under the shipped launch scripts: an end in time, a cause, and a way on.

Every job is started as a user starts it; `tests/support/faulty` makes a rank of it fail, or the test signals it.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cluster import run_ranks
from tests.support.finetune import FAULT_AT, SAVE_STEPS, STEPS, finetune_rank, resumable_options
from tests.support.launched import Job, launched
from tests.support.launchers import REPOSITORY, micro_model, write_records

LIMIT = 60.0  # seconds from the fault until no process is left
WORLD_SIZE = 2
ENGINES = {"torchrun": "ddp", "deepspeed": "zero3", "accelerate": "zero3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


def _launch(
    folder: Path, launcher: str, output: Path, fault: str, *, environment: dict[str, str] | None = None, **changes: Any
) -> contextlib.AbstractContextManager[Job]:
    command = ["bash", REPOSITORY / "launchers" / f"run_{launcher}.sh", *resumable_options(folder, output, **changes)]
    return launched(command, folder / "jobs" / output.parent.name / output.name, fault, **(environment or {}))


def _train(folder: Path, launcher: str, output: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train to the end in processes that start faster than a launcher's; the adapter."""
    argv = resumable_options(folder, output, **changes)
    run_ranks(finetune_rank, WORLD_SIZE, ENGINES[launcher], argv, timeout=240, init_process_group=False)
    return load_file(output / "adapter_model.safetensors")


def _assert_resumed_as_uninterrupted(folder: Path, launcher: str, output: Path) -> None:
    """Continued from the last complete checkpoint, the run ends with the bits of the one that was left alone."""
    whole = folder / f"whole-{ENGINES[launcher]}"
    expected = whole / "adapter_model.safetensors"
    tensors = load_file(expected) if expected.exists() else _train(folder, launcher, whole)
    resumed = _train(folder, launcher, output, resume_from_checkpoint="auto")
    assert resumed.keys() == tensors.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())


def _complete(output: Path) -> list[int]:
    return sorted(
        int(file.parent.name.removeprefix("checkpoint-")) for file in output.glob("checkpoint-*/complete.json")
    )


class Fault(NamedTuple):
    """What happens to which rank, what the output must say then, and the checkpoint that is left to go on from."""

    kind: str
    rank: int
    message: str


KILLED = r"rank {other}: rank {rank} \(process \d+\) was killed by SIGKILL"
RAISED = r"rank {rank}: RuntimeError: out of memory \(a test's\)"
FAILED_WRITE = r"rank {rank}: \w+: .*[\d.]+ MiB free in "
FAULTS = [
    Fault("kill", 1, KILLED),
    Fault("kill", 0, KILLED),
    Fault("raise", 1, RAISED),
    Fault("raise", 0, RAISED),
    Fault("full", 1, FAILED_WRITE),
    Fault("full", 0, FAILED_WRITE),
]
SAMPLED = {("torchrun", "full", 1)}  # the loop's test kills and raises


def _cases() -> Iterator[Any]:
    for launcher in ENGINES:
        for fault in FAULTS:
            marks = [] if (launcher, fault.kind, fault.rank) in SAMPLED else [pytest.mark.all_ranks]
            yield pytest.param(launcher, fault, marks=marks, id=f"{launcher}-{fault.kind}-rank{fault.rank}")


@pytest.mark.parametrize(("launcher", "fault"), _cases())
def test_a_rank_that_fails_ends_the_run_in_time(folder: Path, tmp_path: Path, launcher: str, fault: Fault) -> None:
    """SIGKILL within a step, an exception there, a checkpoint that cannot be written on one rank while the other has
    written its part: with ``save_total_limit=1``, Trainer itself would then have deleted the only good checkpoint.
    """
    output = tmp_path / "run"
    with _launch(folder, launcher, output, f"{fault.kind} {fault.rank} {FAULT_AT}") as job:
        job.seconds_to_the_end(LIMIT)
    printed = job.output()
    assert job.launcher.returncode != 0
    assert re.search(fault.message.format(rank=fault.rank, other=1 - fault.rank), printed.splitlines()[-1]), printed
    assert _complete(output) == [SAVE_STEPS]
    _assert_resumed_as_uninterrupted(folder, launcher, output)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[dict[str, str]]:
    """A file system of a few MiB; where none may be mounted, the fault limits the size of files instead."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield {}
        return
    try:
        yield {"REFLORA_TEST_DISK": str(folder)}
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "launcher", ["deepspeed", *(pytest.param(name, marks=pytest.mark.all_ranks) for name in ("torchrun", "accelerate"))]
)
def test_a_full_disk_leaves_the_last_checkpoint(folder: Path, tmp_path: Path, launcher: str) -> None:
    """No rank can write the second checkpoint; once there is space again, the run goes on from the first."""
    with _small_disk(tmp_path / "disk") as environment:
        output = tmp_path / "disk" / launcher
        with _launch(folder, launcher, output, f"full 0 {FAULT_AT}", environment=environment) as job:
            job.seconds_to_the_end(LIMIT)
        printed = job.output()
        assert job.launcher.returncode != 0
        assert re.search(FAILED_WRITE.format(rank=r"\d"), printed.splitlines()[-1]), printed
        assert not environment or "0.0 MiB free in" in printed
        assert _complete(output) == [SAVE_STEPS]
        (tmp_path / "disk" / "ballast").unlink(missing_ok=True)
        _assert_resumed_as_uninterrupted(folder, launcher, output)


def _to_launcher(job: Job) -> list[int]:
    return [job.launcher.pid]


def _to_everything(job: Job) -> list[int]:
    """As SLURM does when a job's time is up."""
    return list(job.environments())


def _to_one_rank(job: Job) -> list[int]:
    return [job.ranks()[1]]


SAMPLED_SIGNALS = {("torchrun", "SIGTERM", _to_everything)}  # SLURM's test sends SIGUSR1


def _signals() -> Iterator[Any]:
    for launcher in ENGINES:
        for name in ("SIGTERM", "SIGUSR1"):
            for to in (_to_launcher, _to_everything, _to_one_rank):
                if (name, to) == ("SIGUSR1", _to_launcher):
                    continue  # which takes no notice
                marks = [] if (launcher, name, to) in SAMPLED_SIGNALS else [pytest.mark.all_ranks]
                yield pytest.param(launcher, name, to, marks=marks, id=f"{launcher}-{name}{to.__name__}")


@pytest.mark.parametrize(("launcher", "name", "to"), _signals())
def test_a_signal_stops_with_a_checkpoint(folder: Path, tmp_path: Path, launcher: str, name: str, to: Any) -> None:
    """Whichever process gets it, all ranks save after the same step and end; the run goes on as if never stopped.

    The data loader's workers, which SIGTERM would end, get it too.
    """
    output = tmp_path / "run"
    with _launch(folder, launcher, output, "slow 0 0", dataloader_num_workers=1) as job:
        job.wait_for("'epoch': '0.2'")
        job.signal(to(job), signal.Signals[name])
        job.seconds_to_the_end(LIMIT)
    stopped = re.findall(rf"rank 0: stopped by {name} after step (\d+); --resume_from_checkpoint auto", job.output())
    assert len(stopped) == 1 and 2 < int(stopped[0]) < STEPS, job.output()
    assert job.launcher.returncode != 0  # for scripts that put a job back into the queue
    assert _complete(output) == [int(stopped[0])]
    assert not (output / "adapter_model.safetensors").exists()
    _assert_resumed_as_uninterrupted(folder, launcher, output)


@pytest.mark.all_ranks
@pytest.mark.parametrize("launcher", list(ENGINES))
def test_a_rank_that_hangs_is_no_hindrance_to_sigterm(folder: Path, tmp_path: Path, launcher: str) -> None:
    """The others wait for it in a collective, where no Python handler runs; none of them outlives the launcher."""
    output = tmp_path / "run"
    with _launch(folder, launcher, output, f"hang 1 {FAULT_AT}") as job:
        while not job.stamp.exists():
            job.wait_for(f"'epoch': '0.{FAULT_AT - 1}'")
        job.signal(_to_launcher(job), signal.SIGTERM)
        job.seconds_to_the_end(LIMIT)
    assert "rank 0: no checkpoint 25 s after SIGTERM: another rank is gone, or steps are too long" in job.output()
    assert _complete(output) == [SAVE_STEPS]
    _assert_resumed_as_uninterrupted(folder, launcher, output)
