"""One line about what ended a run. Launchers show at most an exit code, some without the rank."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import _get_default_store

from ..screen.lines import LAUNCH_FOLDER, show_last

_FIRST_KEY = "launchers/first_failure"
# messages of gloo, NCCL, the store and our cache when another rank has gone
_LOST_PEER = re.compile(
    r"connection|peer|broken pipe|socket|timed? ?out|NCCL|the rank that makes it failed", re.IGNORECASE
)
_SECONDS_TO_DIE = 3.0
# messages of torch and safetensors about a failed write, mostly without the reason
_FAILED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|I/O error|No space|too large|quota", re.IGNORECASE)


@contextlib.contextmanager
def named_failures(output_dir: str, *, mistakes: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Name the rank and the cause on stderr if the code inside raises; every rank must enter.

    If a rank fails because another one is gone, the line names that one. If both ran on the same machine, the line
    also says how the other one ended. Under a launch script the first line of a machine is its last, and the traceback
    is that rank's; the other ranks fail because of it, and show neither.

    Args:
        output_dir: where the run writes; after a failed write the line has the space left there.
        mistakes: exceptions that a user can correct. They are shown without a traceback, which would hide the message.

    Communication: one all-gather of small objects at the beginning.
    """
    peers = _gather_processes()
    try:
        yield
    except mistakes as error:
        line = _explain(str(error), peers)
        if LAUNCH_FOLDER in os.environ and not line.startswith(str(error)):
            raise SystemExit(1) from error  # the cause is another rank's, which shows it
        raise SystemExit(f"finetune.py: error: {on_rank()}{line}") from error
    except (Exception, CheckpointException) as error:  # DCP's exception is no Exception
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if _FAILED_WRITE.search(text):
            text += f" ({shutil.disk_usage(output_dir).free / 2**20:,.1f} MiB free in {output_dir})"
        line = _explain(text, peers)
        is_first = show_last(f"finetune.py: {on_rank()}{line}", "error")
        if LAUNCH_FOLDER in os.environ and (not is_first or not line.startswith(text)):
            raise SystemExit(1) from error  # the cause is another rank's, and its traceback is no help
        raise


def on_rank() -> str:
    """Return "rank N: ", or an empty text in one process."""
    return f"rank {dist.get_rank()}: " if dist.is_initialized() and dist.get_world_size() > 1 else ""


def _gather_processes() -> list[tuple[str, int]]:
    """Return the host and process id of every rank."""
    own = (socket.gethostname(), os.getpid())
    if not on_rank():
        return [own]
    gathered: list[tuple[str, int]] = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def _explain(text: str, peers: list[tuple[str, int]]) -> str:
    if len(peers) == 1:
        return text
    if _LOST_PEER.search(text):
        lost = _reported() or _find_ended(peers)
        if lost:
            return f"{lost} (seen here as {text})"
        return f"{text}. If no rank tells a cause of its own, one was killed: see the launcher's exit codes"
    with contextlib.suppress(Exception):  # without the store no other rank could read it
        _get_default_store().compare_set(_FIRST_KEY, "", f"{on_rank()}{text}")
    return text


def _reported() -> str | None:
    """Return the message that the first rank that failed by itself left in the store."""
    with contextlib.suppress(Exception):
        store = _get_default_store()
        if store.check([_FIRST_KEY]):
            return f"ended after {store.get(_FIRST_KEY).decode()}"
    return None


def _find_ended(peers: list[tuple[str, int]]) -> str | None:
    """Return how a rank of this machine ended. Wait a little, because connections close before a process ends."""
    local = [(rank, pid) for rank, (host, pid) in enumerate(peers) if host == socket.gethostname()]
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while Path("/proc/self").exists():
        for rank, pid in local:
            ended = how_ended(pid)
            if ended:
                return f"rank {rank} (process {pid}) {ended}"
        reported = _reported()
        if reported or time.monotonic() > deadline:
            return reported
        time.sleep(0.02)
    return None


def how_ended(pid: int) -> str | None:
    """Return how a process of this machine ended; None while it runs. After its parent has waited for it, "is gone"."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "is gone"
    if fields[0] not in "ZX":
        return None
    status = int(fields[49])  # proc(5): exit_code, as wait(2) has it
    if os.WIFSIGNALED(status):
        return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.WEXITSTATUS(status)}"
