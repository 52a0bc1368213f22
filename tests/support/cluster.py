"""Run a function on several ranks: processes on this machine that share a gloo group.

The processes are forked from a server that has torch, transformers, PEFT, accelerate and DeepSpeed
imported already, so a launch costs about a second instead of ten.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported: must stand before the fork server starts.
_LIBRARY_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
_PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "deepspeed",
    "trl.trainer.sft_trainer",
    "tests.support.preload",
)
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE_SECONDS = 3.0  # after the first failure: time for the other ranks to fail with a traceback of their own
_LOG_TAIL = 2000
_server_is_warm: list[bool] = []


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180, init_process_group: bool = True
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank and return the results in rank order.

    Args:
        fn: a module-level function (it travels by name); its result must be picklable.
        world_size: number of processes.
        timeout: seconds after which every rank is killed and its Python stack shown.
        init_process_group: join the ranks in a gloo group before ``fn``. accelerate, HF Trainer and DeepSpeed
            use a group that exists, so this is rarely turned off.

    Raises:
        RuntimeError: a rank failed or the time was up; the message holds the traceback of every rank that
            failed and the stack of every rank that had to be ended.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        folder = Path(directory)
        environment = {**os.environ, **_LIBRARY_ENVIRONMENT, "MASTER_PORT": str(_free_port())}
        context = _fork_server()
        launch = _Launch(fn, args, world_size, folder, environment, init_process_group, timeout)
        processes = [context.Process(target=_rank_main, args=(launch, rank), daemon=True) for rank in range(world_size)]
        for process in processes:
            process.start()
        trouble = _supervise(processes, folder, timeout)
        _remove_shared_buffers(environment["MASTER_PORT"])
        if trouble:
            raise RuntimeError(_failure_report(trouble, processes, folder))
        return [_load(folder / f"{rank}.result") for rank in range(world_size)]


def _remove_shared_buffers(port: str) -> None:
    """DeepSpeed leaves 64 MB of shared memory for each rank that did not end by itself."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def _fork_server() -> Any:
    """The multiprocessing context whose server has imported the heavy libraries (started on first use)."""
    context = multiprocessing.get_context("forkserver")
    if _server_is_warm:
        return context
    # only what the server inherits: this process keeps its own settings
    before = {name: os.environ.get(name) for name in _LIBRARY_ENVIRONMENT}
    os.environ.update(_LIBRARY_ENVIRONMENT)
    try:
        context.set_forkserver_preload(list(_PRELOAD))
        # runs once the imports are done, so that no caller's timeout pays for them
        warm_up = context.Process(target=_do_nothing)
        warm_up.start()
        warm_up.join()
        _server_is_warm.append(True)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _do_nothing() -> None:
    pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _supervise(processes: Sequence[BaseProcess], folder: Path, timeout: float) -> str:
    """Wait for all ranks; end them at the first failure or at the timeout. Returns what went wrong, or ''."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes):
            return ""
        if any(code not in (None, 0) for code in codes):
            _end(processes, folder, grace=_GRACE_SECONDS)
            return f"a rank failed (exit codes {[process.exitcode for process in processes]})"
        time.sleep(0.02)
    _end(processes, folder, grace=0.0)
    return f"timeout: the ranks were not done after {timeout:g} s"


def _end(processes: Sequence[BaseProcess], folder: Path, grace: float) -> None:
    """Let ranks fail on their own for ``grace`` seconds; have the rest write their stacks, and kill them."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        time.sleep(0.02)
    for rank, process in enumerate(processes):
        # without its handler in place (the stack file exists from then on) the signal would end the rank
        if process.is_alive() and process.pid and (folder / f"{rank}.stack").exists():
            os.kill(process.pid, signal.SIGUSR2)
    time.sleep(0.3)
    for process in processes:
        process.kill()
        process.join()


def _failure_report(trouble: str, processes: Sequence[BaseProcess], folder: Path) -> str:
    """One text: every rank's traceback, the stack of a rank that was ended, and what the ranks printed."""
    lines = [trouble]
    for rank, process in enumerate(processes):
        error, stack, log = (_read(folder / f"{rank}.{kind}") for kind in ("error", "stack", "log"))
        if error:
            lines.append(f"--- rank {rank} raised ---\n{error.rstrip()}")
        elif stack:
            lines.append(f"--- rank {rank} was ended here ---\n{stack.rstrip()}")
        elif process.exitcode != 0:
            lines.append(f"--- rank {rank} ended with exit code {process.exitcode} and no traceback ---")
        if log.strip():
            lines.append(f"--- rank {rank} printed last ---\n{log[-_LOG_TAIL:].rstrip()}")
    return "\n".join(lines)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=False)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What all ranks of a launch share."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int
    folder: Path
    environment: dict[str, str]
    init_process_group: bool
    timeout: float


def _rank_main(launch: _Launch, rank: int) -> None:
    """Body of one rank. Ends by ``os._exit``: gloo's threads can abort an interpreter that shuts down."""
    folder = launch.folder
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    gc.freeze()  # DeepSpeed collects garbage often: it need not walk through what was imported before the fork
    with open(folder / f"{rank}.stack", "w") as stack_file:
        faulthandler.register(signal.SIGUSR2, file=stack_file, all_threads=True)
        # a guard of its own, in case the parent is gone and nobody ends this rank
        faulthandler.dump_traceback_later(launch.timeout + 30, exit=True, file=stack_file)
        try:
            _join(launch, rank)
            _save(launch.fn(rank, launch.world_size, *launch.args), folder / f"{rank}.result")
            _leave()
            code = 0
        except BaseException:
            # written under another name first, so that nobody reads half of it
            (folder / f"{rank}.part").write_text(traceback.format_exc())
            (folder / f"{rank}.part").rename(folder / f"{rank}.error")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _join(launch: _Launch, rank: int) -> None:
    """Set the launcher's variables and, if asked, join the gloo group by a file store (no port to race for)."""
    import torch
    import torch.distributed as dist

    world_size = launch.world_size
    values = (rank, world_size, rank, world_size, "127.0.0.1", launch.environment["MASTER_PORT"])
    os.environ.update(launch.environment)
    os.environ.update({name: str(value) for name, value in zip(_RANK_VARIABLES, values, strict=True)})
    torch.set_num_threads(1)
    if launch.init_process_group:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{launch.folder / 'store'}",
            rank=rank,
            world_size=world_size,
            # longer than any test: a hang shall be reported by the supervisor, with every rank's stack
            timeout=datetime.timedelta(minutes=30),
        )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _save(result: Any, path: Path) -> None:
    import torch

    torch.save(result, path)
