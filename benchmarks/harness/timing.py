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
    """Return the time in seconds after waiting for the device and all ranks. Users wait for the slowest rank."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()  # NCCL's barrier is a kernel itself
    return time.perf_counter()


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar on the first rank's terminal. Yield the function that advances it by one."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:  # rich is optional
        Progress = None
    other_rank = dist.is_initialized() and dist.get_rank() != 0
    if Progress is None or other_rank or not sys.stderr.isatty():
        yield lambda: None
        return
    # no refreshing thread, which would disturb the timing
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.update(task, advance=1, refresh=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and number of values."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0], "count": len(values)}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high, "count": len(values)}


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of peak memory on a GPU. A process's peak resident set is not reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the allocator's peak on a GPU, the peak resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
