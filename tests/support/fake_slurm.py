"""sbatch, srun and scontrol as far as the batch scripts use them: every "node" is a group of processes here.

Called by one of those names. An option that it does not know is an error, as it is for SLURM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

# the machines' names; all are this one
_HOST = "127.0.0.1"
_JOB_ID = "4242"
_BATCH_OPTIONS = ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal")
_BATCH_OPTIONS += ("open-mode", "output")
_NOT_THE_JOBS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def sbatch(argv: list[str]) -> int:
    """Run the script as SLURM does: from a copy elsewhere, and again after each ``scontrol requeue``."""
    parser = argparse.ArgumentParser("sbatch", allow_abbrev=False)
    for option in _BATCH_OPTIONS:
        parser.add_argument(f"--{option}")
    parser.add_argument("--requeue", action="store_true")
    index = next(i for i, argument in enumerate(argv) if argument.endswith(".sbatch"))
    script = Path(argv[index])
    directives = re.findall(r"^#SBATCH (\S+)", script.read_text(), re.MULTILINE)
    options = parser.parse_args([*directives, *argv[:index]])
    assert options.requeue and options.ntasks_per_node == "1" and options.signal.startswith("B:USR1@")
    folder = Path(os.environ["FAKE_SLURM"])
    spooled = Path(tempfile.mkdtemp(dir=folder)) / "slurm_script"
    spooled.write_text(script.read_text())
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_THE_JOBS}
    environment |= {"SLURM_JOB_ID": _JOB_ID, "SLURM_JOB_NODELIST": f"node[1-{options.nodes}]"}
    environment |= {"SLURM_JOB_NUM_NODES": options.nodes, "SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": os.getcwd()}
    for restart in range(3):
        (folder / "requeued").unlink(missing_ok=True)
        job = subprocess.Popen(["bash", spooled, *argv[index + 1 :]], env=environment)
        (folder / "batch_script.pid").write_text(f"{restart} {job.pid}")
        code = job.wait()
        if not (folder / "requeued").exists():
            return code
        environment["SLURM_RESTART_COUNT"] = str(restart + 1)
    return 1


def srun(argv: list[str]) -> int:
    """One process per node; the first that fails ends the others."""
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    for option in ("--nodes", "--ntasks", "--ntasks-per-node", "--kill-on-bad-exit"):
        parser.add_argument(option, type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    assert options.ntasks == options.nodes and options.ntasks_per_node == options.kill_on_bad_exit == 1
    assert os.environ["SRUN_CPUS_PER_TASK"] == "1"
    tasks = [
        psutil.Popen(options.command, env={**os.environ, "SLURM_NODEID": str(node)}) for node in range(options.nodes)
    ]
    signal.signal(signal.SIGTERM, lambda *_: _end(tasks))
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks):
            _end(tasks)
        time.sleep(0.1)
    return max(abs(task.returncode) for task in tasks)


def _end(tasks: list[psutil.Popen]) -> None:
    """SIGTERM and then SIGKILL to every process of the tasks that run."""
    running = [task for task in tasks if task.poll() is None]
    processes = running + [child for task in running for child in task.children(recursive=True)]
    for end in ("terminate", "kill"):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, end)()
        psutil.wait_procs(processes, timeout=2)


def scontrol(argv: list[str]) -> int:
    """``show hostnames LIST`` and ``requeue JOB``."""
    if argv[:2] == ["show", "hostnames"]:
        last = re.fullmatch(r"node\[1-(\d+)\]", argv[2])
        assert last
        print("\n".join([_HOST] * int(last[1])))
        return 0
    assert argv == ["requeue", _JOB_ID], argv
    (Path(os.environ["FAKE_SLURM"]) / "requeued").touch()
    return 0


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[name](sys.argv[1:]))
