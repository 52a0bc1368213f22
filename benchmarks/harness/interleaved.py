"""Time variants against each other in blocks that take turns, so that all see the same state of the machine."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from benchmarks.harness.collectives import Collective, issue_all, recorded
from benchmarks.harness.timing import now, reset_peak_memory
from benchmarks.harness.variants import before_update, innermost_engine, installed
from benchmarks.harness.workloads import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The extent of a measurement.

    Attributes:
        blocks: number of blocks per variant.
        steps: measured steps per block.
        block_seconds: time limit of a block; a slow variant has fewer steps, at least one.
    """

    blocks: int
    steps: int
    block_seconds: float


@dataclasses.dataclass
class Times:
    """Milliseconds of one variant, a list per block.

    Attributes:
        step_ms: the optimizer step alone; the device is waited for before and after.
        whole_step_ms: the whole step of the workload. A block has one value, the mean over steps that run without
            waiting for the device.
    """

    step_ms: list[list[float]] = dataclasses.field(default_factory=list)
    whole_step_ms: list[list[float]] = dataclasses.field(default_factory=list)


def measure_times(
    workloads: Mapping[str, Workload],
    schedule: Schedule,
    device: torch.device,
    advance: Callable[[], None],
    calls: Sequence[Collective] = (),
) -> tuple[dict[str, Times], Times, Times]:
    """Time every variant and the bare collectives, block after block. Every other round is in reverse order.

    Args:
        workloads: the workloads by variant.
        schedule: the extent of the measurement.
        device: this rank's device.
        advance: called after every block of a variant.
        calls: collectives to time, with plain LoRA's workload.

    Returns:
        Times by variant; times of issuing ``calls`` again and again; and times of plain LoRA that issues them before
        every update, where ranks arrive as in a step. The last two are empty if there are no calls.
    """
    names = list(workloads)
    times, bare, placed = {name: Times() for name in names}, Times(), Times()
    for block in range(schedule.blocks):
        for name in names if block % 2 == 0 else reversed(names):
            with installed(name, workloads[name].trainee):
                _time_block(workloads[name], schedule, device, times[name])
            advance()
        if calls:
            plain = workloads["lora"]
            bare.step_ms.append(_time_calls(calls, schedule.steps, device))
            with before_update(innermost_engine(plain.trainee), functools.partial(issue_all, calls)):
                _time_block(plain, schedule, device, placed)
    return times, bare, placed


def _time_block(workload: Workload, schedule: Schedule, device: torch.device, times: Times) -> None:
    run_step(workload)  # the variant plans and compiles in its first step
    seconds, _ = _timed_step(workload, device)  # decides how many steps fit into the block
    steps = _agreed(max(1, min(schedule.steps, int(schedule.block_seconds / seconds))), device)
    times.step_ms.append([_timed_step(workload, device)[1] for _ in range(steps)])
    start = now(device)
    for _ in range(steps):
        run_step(workload)
    times.whole_step_ms.append([1e3 * (now(device) - start) / steps])


def _timed_step(workload: Workload, device: torch.device) -> tuple[float, float]:
    """Return the seconds of the whole step, and the milliseconds of its optimizer step."""
    start = now(device)
    workload.prepare()
    middle = now(device)
    workload.step()
    end = now(device)
    return end - start, 1e3 * (end - middle)


def _agreed(steps: int, device: torch.device) -> int:
    """Return the first rank's number, because all ranks must run equally many steps."""
    number = torch.tensor(steps, device=device)
    dist.broadcast(number, src=0)
    return int(number)


def _time_calls(calls: Sequence[Collective], steps: int, device: torch.device) -> list[float]:
    issue_all(calls)
    elapsed_ms = []
    for _ in range(steps):
        start = now(device)
        issue_all(calls)
        elapsed_ms.append(1e3 * (now(device) - start))
    return elapsed_ms


def record_collectives(workload: Workload, name: str) -> list[Collective]:
    """Return the collectives of a variant's second step; the first one may issue others.

    Raises:
        RuntimeError: the variant reports another number of collectives than it issued.
    """
    with installed(name, workload.trainee) as handle:
        run_step(workload)
        with recorded() as calls:
            run_step(workload)
        reported = handle.report().collectives_per_step
    if len(calls) != sum(reported.values()):
        raise RuntimeError(f"{name} reports {reported} per step, but {[call.kind for call in calls]} were seen")
    return calls


def measure_memory(workload: Workload, name: str, device: torch.device) -> dict[str, int]:
    """Measure the bytes that a variant uses on a GPU, from the allocator.

    Returns:
        ``held_bytes``: kept between steps, beyond what exists without the variant; ``step_peak_bytes``: peak of the
        optimizer step alone, above the allocation before it; ``training_peak_bytes``: largest allocation of a whole
        step; ``reserved_bytes``: the memory that the allocator took from the device.
    """
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    with installed(name, workload.trainee):
        run_step(workload)
        held = torch.cuda.memory_allocated(device) - before
        reset_peak_memory(device)
        workload.prepare()
        training_peak = torch.cuda.max_memory_allocated(device)
        reset_peak_memory(device)
        allocated = torch.cuda.memory_allocated(device)
        workload.step()
        torch.cuda.synchronize(device)
        step_peak = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.memory_reserved(device)
    return {
        "held_bytes": held,
        "step_peak_bytes": step_peak - allocated,
        "training_peak_bytes": max(training_peak, step_peak),
        "reserved_bytes": reserved,
    }


def run_step(workload: Workload) -> None:
    """Run one whole step, not timed."""
    workload.prepare()
    workload.step()


def flattened(blocks: Sequence[Sequence[float]]) -> list[float]:
    """Return all values of all blocks."""
    return [value for block in blocks for value in block]
