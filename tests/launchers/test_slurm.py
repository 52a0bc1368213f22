"""The batch scripts under commands that stand for SLURM's: two nodes on this machine, a warning, a second start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.launchers import REPOSITORY, free_port, launch, micro_model, write_records

SLURM = REPOSITORY / "launchers" / "slurm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    for command in ("sbatch", "srun", "scontrol"):
        executable = folder / "bin" / command
        executable.parent.mkdir(exist_ok=True)
        executable.write_text(f"#!{sys.executable}\n{(REPOSITORY / 'tests' / 'support' / 'fake_slurm.py').read_text()}")
        executable.chmod(0o755)
    return folder


def _environment(folder: Path) -> dict[str, str]:
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "FAKE_SLURM": str(folder), "PROCESSES": "1", "PORT": str(free_port())}


def _options(folder: Path, output: str, **changes: Any) -> list[str]:
    options = {
        "model": folder / "model",
        "dataset": folder / "records.jsonl",
        "output_dir": folder / output,
        "cache_dir": folder / "cache",
        "reflora_warmup_steps": 1,
        "max_length": 96,
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        **changes,
    }
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize(
    ("launcher", "config", "engine"),
    [
        ("accelerate", [], "zero3"),
        ("deepspeed", ["ds_configs/zero2.json"], "zero2"),
        ("torchrun", [], "ddp"),
    ],
)
@pytest.mark.all_ranks
def test_a_batch_script_trains_on_two_nodes(folder: Path, launcher: str, config: list[str], engine: str) -> None:
    command = ["sbatch", "--nodes=2", SLURM / f"{launcher}.sbatch", *config, *_options(folder, launcher)]
    printed = launch(command, timeout_s=280, **_environment(folder))
    metrics = json.loads((folder / launcher / "metrics.json").read_text())
    assert (metrics["report"]["engine"], metrics["world_size"], metrics["steps"]) == (engine, 2, 3)
    assert metrics["report"]["applied_steps"] == 2
    assert f"job 4242, start 1: {launcher} on 2 node(s), head 127.0.0.1:" in printed
    assert not (folder / "requeued").exists()


@pytest.mark.all_ranks
@pytest.mark.timeout(900)
def test_a_warned_job_is_queued_again_and_goes_on(folder: Path) -> None:
    """The warning ends the ranks, not the launchers; the second start resumes from a checkpoint and finishes."""
    options = _options(folder, "warned", max_steps=40, save_strategy="steps", save_steps=2, save_total_limit=0)
    options += ["--lr_scheduler_type=linear", "--overwrite_output_dir=True"]  # of which the second start must not hear
    command = ["sbatch", "--nodes=2", SLURM / "deepspeed.sbatch", *options]
    log, checkpoint = folder / "warned.log", folder / "warned" / "checkpoint-2" / "trainer_state.json"
    with log.open("w") as output:
        job = subprocess.Popen(
            [str(part) for part in command],
            cwd=REPOSITORY,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
            | _environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(checkpoint, job, log)
        written = checkpoint.stat().st_mtime_ns
        start, batch_script = (folder / "batch_script.pid").read_text().split()
        assert start == "0"
        os.kill(int(batch_script), signal.SIGUSR1)
        assert job.wait(timeout=300) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    printed = log.read_text()
    assert "queueing job 4242 again" in printed and "start 2" in printed
    metrics = json.loads((folder / "warned" / "metrics.json").read_text())
    assert [point["step"] for point in metrics["train_loss"]] == list(range(1, 41))
    assert checkpoint.stat().st_mtime_ns == written, "it began at the beginning"


def _wait_for(path: Path, job: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 280
    while not path.exists():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.all_ranks
def test_a_job_that_fails_is_not_queued_again(folder: Path) -> None:
    command = ["sbatch", "--nodes=2", SLURM / "torchrun.sbatch", *_options(folder, "mistake", max_length=2)]
    printed = launch(command, timeout_s=200, expect_failure=True, **_environment(folder))
    assert "max_length=2 is too short" in printed
    assert "again" not in printed and not (folder / "requeued").exists()


@pytest.mark.all_ranks
def test_a_batch_script_starts_a_benchmark(folder: Path) -> None:
    record = folder / "overhead.json"
    command = ["sbatch", "--nodes=2", SLURM / "torchrun.sbatch", "benchmarks/overhead.py", "--engine", "fsdp2"]
    command += ["--num_layers", "1", "--blocks", "2", "--steps", "2", "--output", record]
    launch(command, timeout_s=280, **_environment(folder))
    assert json.loads(record.read_text())["world_size"] == 2


_WARNED = """
. "$REFLORA_REPOSITORY/launchers/slurm/common.sh"
export SLURM_JOB_ID=$JOB
sleep 60 & step=$!
RANK=0 bash -c "$1; sleep 60 & echo started; wait \\$!; sleep 60" > "$FOLDER/rank" & rank=$!
until [ -s "$FOLDER/rank" ]; do sleep 0.1; done
worker=$(ps -o pid= --ppid $rank)
stop_ranks
sleep 0.5
for process in rank step worker; do ps -o stat= -p ${!process} | grep -q '^[^Z]' && echo "$process goes on"; done
kill $worker $rank $step 2> /dev/null || true
"""


@pytest.mark.parametrize(
    ("rank", "left"),
    [
        ("trap 'exit 0' USR1", ["step", "worker"]),
        ("trap '' USR1", ["rank", "worker"]),
    ],
    ids=["that would save", "that ignores it"],
)
def test_a_warning_goes_to_ranks_or_ends_the_step(tmp_path: Path, rank: str, left: list[str]) -> None:
    """Workers of a rank get nothing. Where no rank would do anything, the step ends, so that the job comes back."""
    environment = {"REFLORA_REPOSITORY": str(REPOSITORY), "FOLDER": str(tmp_path), "JOB": f"test-{os.getpid()}"}
    done = subprocess.run(
        ["bash", "-c", _WARNED, "bash", rank],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=30,
    )
    assert done.stdout.splitlines() == [f"{process} goes on" for process in left]


def test_a_script_that_does_not_exist_is_named(folder: Path) -> None:
    command = ["sbatch", "--nodes=2", SLURM / "torchrun.sbatch", "nothing.py"]
    assert "nothing.py does not exist" in launch(command, timeout_s=60, expect_failure=True, **_environment(folder))
