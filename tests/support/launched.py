"""A job started by one of the shipped scripts, which a test interrupts: its ranks, its processes, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.support.launchers import REPOSITORY

_MARK = "REFLORA_TEST_JOB"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "PROCESSES": "2",
    "VIRTUAL_ENV": sys.prefix,
}


class Job:
    """Started at once; every process of it, however it is related to the others, carries a mark."""

    def __init__(self, command: list[str | Path], folder: Path, fault: str = "", **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self.log, self.stamp = folder / "log", folder / "time_of_fault"
        python_path = [REPOSITORY / "tests" / "support" / "faulty", REPOSITORY, os.environ.get("PYTHONPATH", "")]
        variables = {
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, python_path))),
            _MARK: self.mark,
            "REFLORA_TEST_FAULT": fault,
            "REFLORA_TEST_STAMP": str(self.stamp),
            **environment,
        }
        with open(self.log, "wb") as log:
            self.launcher = subprocess.Popen(
                [str(part) for part in command],
                cwd=REPOSITORY,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What all its processes have printed so far."""
        return self.log.read_text(errors="replace")

    def environments(self) -> dict[int, dict[str, str]]:
        """Every process of the job that runs, with its environment."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                    environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
                    if environment.get(_MARK) == self.mark:
                        found[int(folder.name)] = environment
        return found

    def ranks(self) -> dict[int, int]:
        """The process of each rank, but none that a rank started."""
        environments = self.environments()
        ranks = {pid: int(e["RANK"]) for pid, e in environments.items() if "RANK" in e}
        return {rank: pid for pid, rank in ranks.items() if _parent(pid) not in ranks}

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Until the job has printed that.

        Raises:
            AssertionError: it has not in time, or ended before; with all that it printed.
        """
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert self.launcher.poll() is None and time.monotonic() < deadline, f"no {text!r} in:\n{self.output()}"
            time.sleep(0.05)

    def signal(self, pids: list[int], number: signal.Signals) -> None:
        """Send a signal; from now on the time to the job's end is taken."""
        self.stamp.write_text(str(time.time()))
        for pid in pids:
            os.kill(pid, number)

    def seconds_to_the_end(self, limit: float, start_limit: float = 240) -> float:
        """Wait until no process is left; how long that took from the fault on. The launcher is waited for, too.

        Raises:
            AssertionError: some were left after ``limit`` seconds; they are killed.
        """
        deadline = time.monotonic() + start_limit
        while not self.stamp.exists() and self.launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            assert self.stamp.exists(), f"ended, or was stuck, before the fault:\n{self.output()}"
            fault = float(self.stamp.read_text() or time.time())
            while (self.launcher.poll() is None or self.environments()) and time.time() < fault + limit:
                time.sleep(0.05)
            left = self.environments()
            assert not left and self.launcher.poll() is not None, f"{left} left after {limit} s:\n{self.output()}"
            return time.time() - fault
        finally:
            self.kill()

    def kill(self) -> None:
        """End what is left of it."""
        for pid in self.environments():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait(10)


@contextlib.contextmanager
def launched(command: list[str | Path], folder: Path, fault: str = "", **environment: str) -> Iterator[Job]:
    """A job of which nothing is left afterwards."""
    job = Job(command, folder, fault, **environment)
    try:
        yield job
    finally:
        job.kill()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
