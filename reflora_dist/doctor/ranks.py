"""What differs between ranks or machines; and, under a launcher, how long the method's collectives take."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..collectives.communicator import Communicator
from ..step.traffic import Traffic
from .findings import Findings

_ENVIRONMENT = ("NCCL_", "TORCH_", "PYTORCH_", "FSDP_", "ACCELERATE_", "DS_", "CUBLAS_")
# These have to differ.
_OWN = ("machine_rank", "TORCH_NCCL_DUMP_FILE", "ACCELERATE_TORCH_DEVICE")
_WARM_UP, _TIMED = 3, 7


def join() -> torch.device:
    """Join the launcher's process group; the device that this rank computes on."""
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group(device_id=device if device.type == "cuda" else None)
    return device


def flattened(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` -> ``("a.b", 1)``."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flattened(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def environment() -> dict[str, str]:
    """What of this process's environment decides how it trains."""
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT) and name not in _OWN
    }
    return {"python": platform.python_version(), **variables}


def compare(what: str, by_owner: Mapping[str, Mapping[str, Any]], findings: Findings, *, is_error: bool = True) -> None:
    """Name every key in which an owner differs from the first.

    Args:
        what: is compared, for the message.
        by_owner: a rank's or a file's values.
    """
    (first, reference), *others = by_owner.items()
    reference = dict(flattened(reference))
    report = findings.error if is_error else findings.warning
    for owner, values in others:
        own = dict(flattened(values))
        for key in sorted(reference.keys() | own.keys()):
            if key in _OWN or own.get(key, "absent") == reference.get(key, "absent"):
                continue
            report(
                what,
                f"{key} differs: {first} has {reference.get(key, 'absent')!r}, {owner} has {own.get(key, 'absent')!r}",
                "make them the same",
            )


def gather(own: Any) -> list[Any]:
    """Every rank's object. Communication: one all-gather; every rank must call."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def time_collectives(traffic: Traffic, ranks: int, device: torch.device) -> list[dict[str, Any]]:
    """Time one of each collective that the method issues, of the sizes that it sends, in all copies at once.

    The exchange is that of the rank that sends most, there and back in one: an all-to-all sends equal parts to all
    ranks of a copy, neighbours' rows all go to the next rank. Where the job's ranks are not a multiple of a copy's
    (more were asked about than there are), everything goes over all of them.

    Args:
        ranks: that hold one copy together.

    Returns:
        Per collective its kind, the bytes that a rank sends, and the milliseconds of the slowest rank (the median of
        some calls).

    Communication: several of each, and all-gathers; every rank must call.
    """
    exchanged = max(sum(traffic.exchanged(rank)) for rank in range(ranks))
    group = dist.group.WORLD
    if 1 < ranks < dist.get_world_size() and dist.get_world_size() % ranks == 0:
        group, _ = dist.new_subgroups(ranks)
    comm = Communicator(group, device)
    measured = []
    if traffic.reduced:
        bucket = torch.zeros(traffic.reduced // 8, dtype=torch.float64, device=comm.device)
        measured.append(_timed(comm, "all_reduce", lambda: comm.all_reduce([bucket])))
    if traffic.gathered:
        share = torch.zeros(traffic.gathered // 8, dtype=torch.float64, device=comm.device)
        measured.append(_timed(comm, "all_gather", lambda: comm.all_gather(share)))
    # there and back are calls of their own; one call of all of it shows the bandwidth
    if exchanged and traffic.neighbours and comm.world_size > 1:
        rows = torch.zeros(exchanged // 4, dtype=torch.float32, device=comm.device)
        there, back = ({(comm.rank + step) % comm.world_size: len(rows)} for step in (1, -1))
        measured.append(_timed(comm, "send_recv", lambda: comm.between_neighbours(rows, there, back)))
    elif exchanged and comm.world_size > 1:
        each = exchanged // 4 // (comm.world_size - 1)
        parts = dict.fromkeys(range(comm.world_size), each)
        send = torch.zeros(sum(parts.values()), dtype=torch.float32, device=comm.device)
        measured.append(_timed(comm, "all_to_all", lambda: comm.all_to_all(send, parts, parts)))
    return measured


def _timed(comm: Communicator, kind: str, call: Any) -> dict[str, Any]:
    for _ in range(_WARM_UP):
        call()
    seconds = []
    for _ in range(_TIMED):
        dist.barrier()
        _wait(comm.device)
        comm.start_step()
        start = time.perf_counter()
        call()
        _wait(comm.device)
        seconds.append(time.perf_counter() - start)
    slowest = max(gather(statistics.median(seconds)))
    gbit = comm.bytes * 8 / slowest / 1e9
    return {"collective": kind, "sent_bytes": comm.bytes, "milliseconds": 1e3 * slowest, "gbit_per_second": gbit}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def smallest_memory_gib(device: torch.device) -> float | None:
    """Memory of this device; None on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


def names(count: int, hosts: Sequence[str]) -> list[str]:
    """How to call the ranks in messages."""
    return [f"rank {rank} ({hosts[rank]})" for rank in range(count)]
