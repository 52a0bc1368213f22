"""Count and time bare collectives and packing, to which the cost model is fitted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import cost_model
from benchmarks.costs import events as cost_events
from benchmarks.harness import timing
from reflora_dist.collectives import communicator

MESSAGE_BYTES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
EVICTED_BYTES = 1 << 26  # touched before each measurement: forward and backward leave nothing of a step in a cache


def collectives(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield each kind of collective in every size: ``{"kind", "size", "counts", "run"}``. ``run`` returns seconds."""
    ranks = dist.get_world_size()
    topology = cost_events.Topology(ranks, ranks)
    for size in MESSAGE_BYTES:
        numel = size // 4 // ranks * ranks
        whole = torch.ones(numel, device=device)
        out = torch.empty_like(whole)
        part = whole[: numel // ranks].clone()
        double = torch.ones(numel // 2, dtype=torch.float64, device=device)
        sent = 4 * numel * (ranks - 1) / ranks
        gather = cost_events.all_gather(4 * numel, topology)
        runs = {
            "all_reduce": (lambda t=double: dist.all_reduce(t), cost_events.all_reduce(8 * (numel // 2), topology)),
            "all_gather": (lambda o=out, p=part: communicator._all_gather(o, p), gather),
            "all_to_all": (
                # with explicit sizes, as in an exchange, though they are equal here
                lambda o=out, w=whole, n=[numel // ranks] * ranks: dist.all_to_all_single(o, w, n, n),
                cost_events.all_to_all(sent, topology),
            ),
            "send_recv": (
                lambda o=out, w=whole: _to_neighbours(w, o),
                cost_events.messages(4.0 * numel, min(2, ranks - 1), 0),
            ),
        }
        for kind, (run, counts) in runs.items():
            yield {"kind": kind, "size": f"{size} bytes", "counts": counts, "run": _timed(run, device)}


def _to_neighbours(sent: torch.Tensor, received: torch.Tensor) -> None:
    """Exchange a half with either neighbour, as for cut rows; on two ranks exchange all with the other."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    neighbours = sorted({(rank - 1) % ranks, (rank + 1) % ranks})
    numel = sent.numel() // len(neighbours)  # equal on both sides: a message of another size ends gloo's process
    operations = [
        dist.P2POp(operation, whole[place * numel : (place + 1) * numel], peer)
        for operation, whole in ((dist.isend, sent), (dist.irecv, received))
        for place, peer in enumerate(neighbours)
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def packings(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield packings: pieces are collected, reordered by grains, ordered back and written, as in an exchange."""
    sizes = ((4, 256), (4, 65536), (64, 256), (64, 16384), (256, 1024))
    for (pieces, numel), grain in itertools.product(sizes, (1, 16)):
        tensors = [torch.ones(numel, device=device) for _ in range(pieces)]
        room, ordered = (torch.empty(pieces * numel // grain, grain, device=device) for _ in range(2))
        views = room.view(-1).split(numel)
        # sorts whole pieces by rank, stable, as an exchange does
        by_rank = torch.sort(torch.arange(pieces) % dist.get_world_size(), stable=True).indices
        order = torch.arange(pieces * numel // grain).view(pieces, -1)[by_rank].flatten().to(device)

        def run(
            tensors: list[torch.Tensor] = tensors,
            views: tuple[torch.Tensor, ...] = views,
            room: torch.Tensor = room,
            ordered: torch.Tensor = ordered,
            order: torch.Tensor = order,
        ) -> None:
            torch._foreach_copy_(views, tensors)
            torch.index_select(room, 0, order, out=ordered)
            torch.index_select(ordered, 0, order, out=room)
            torch._foreach_copy_(tensors, views)

        twice = 2 * pieces * numel
        counts = cost_model.packing(2 * pieces, twice, twice, grain)
        size = f"{pieces} x {numel}, by {grain}"
        yield {"kind": "pack", "size": size, "counts": counts, "run": _timed(run, device)}


def _timed(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    evicted = torch.zeros(EVICTED_BYTES // 4, device=device)

    def timed() -> float:
        evicted.add_(1)
        start = timing.now(device)
        run()
        return since(start, device)

    return timed


def since(start: float, device: torch.device) -> float:
    """Return the seconds from ``start`` until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
