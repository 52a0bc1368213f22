"""Times, progress and peak memory."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist


def now(device: torch.device) -> float:
    """Seconds, once the device and all ranks have come this far: the slowest rank is what users wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()  # NCCL's barrier is a kernel itself
    return time.perf_counter()


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[], None]]:
    """A progress bar on the first rank's terminal; yields the function that moves it on by one."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:  # only nicer with it
        Progress = None
    other_rank = dist.is_initialized() and dist.get_rank() != 0
    if Progress is None or other_rank or not sys.stderr.isatty():
        yield lambda: None
        return
    # no refreshing thread, which would run beside what is timed
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.update(task, advance=1, refresh=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, and how many values they are of."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0], "count": len(values)}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high, "count": len(values)}


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of peak memory. A process's peak resident set cannot be set back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the allocator on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
