"""Comparison of ranks and machines, and timing of the method's collectives under a launcher."""

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
# These differ between ranks by design.
_OWN = ("machine_rank", "TORCH_NCCL_DUMP_FILE", "ACCELERATE_TORCH_DEVICE")
_WARM_UP, _TIMED = 3, 7


def join() -> torch.device:
    """Join the launcher's process group and return the device of this rank.

    Communication: every rank must call.
    """
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
    """Yield the leaves of nested mappings: ``("a.b", 1)`` for ``{"a": {"b": 1}}``."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flattened(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def environment() -> dict[str, str]:
    """Return the Python version and the environment variables that influence training."""
    variables = {
        name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT) and name not in _OWN
    }
    return {"python": platform.python_version(), **variables}


def compare(what: str, by_owner: Mapping[str, Mapping[str, Any]], findings: Findings, *, is_error: bool = True) -> None:
    """Add a finding for every key in which an owner differs from the first.

    Args:
        what: name of the compared values, for the findings.
        by_owner: the values of each rank or file, by its name.
        findings: receives the differences.
        is_error: whether a difference is an error, not a warning.
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
    """Return the objects of all ranks. Communication: one all-gather; every rank must call."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def time_collectives(traffic: Traffic, ranks: int, device: torch.device) -> list[dict[str, Any]]:
    """Time each kind of collective that the method issues, with its real sizes, in all copies at once.

    The exchange has the size of the rank that sends most, both directions in one call. An all-to-all sends equal parts
    to all ranks of a copy; an exchange of cut rows sends everything to the next rank. If the number of launched ranks
    is not a multiple of ``ranks``, the collectives run over all launched ranks.

    Args:
        traffic: the method's traffic.
        ranks: number of ranks that hold one copy together.
        device: device of this rank.

    Returns:
        Per collective its kind, the bytes that a rank sends, the milliseconds of the slowest rank (median of several
        calls), and the resulting Gbit/s.

    Communication: several calls of each collective, and all-gathers; every rank must call.
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
    # a step sends the two directions in separate calls; one call with all bytes shows the bandwidth better
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
    """Return the memory of this device in GiB; None on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


def names(count: int, hosts: Sequence[str]) -> list[str]:
    """Return the names of the ranks in messages."""
    return [f"rank {rank} ({hosts[rank]})" for rank in range(count)]
