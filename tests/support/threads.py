"""Ranks as threads of one process, for exchanges over layouts that no engine has to be built for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reflora_dist.collectives.communicator import Communicator, Counts


class ThreadRank(Communicator):
    """A rank whose collectives go through the process's memory.

    Args:
        sent: where every rank leaves what it sends, shared by all.
        barrier: of all ranks; None to plan only.
    """

    def __init__(self, rank: int, sent: list[Any], barrier: threading.Barrier | None, device: torch.device) -> None:
        super().__init__(None, device)
        self.world_size, self.rank = len(sent), rank
        self._sent, self._barrier = sent, barrier

    def meet(self) -> None:
        """Wait until all ranks have come here."""
        assert self._barrier is not None, "for planning only"
        self._barrier.wait()

    def all_to_all(self, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        return self._exchange("all_to_all", send, send_counts, receive_counts)

    def between_neighbours(self, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        return self._exchange("send_recv", send, send_counts, receive_counts)

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In the order of ranks on every rank, so with the same bits."""
        everyone = self._all(list(tensors))
        self._count("all_reduce", 0)
        return [sum(parts[1:], parts[0].clone()) for parts in zip(*everyone, strict=True)]

    def all_gather(self, tensor: Tensor) -> Tensor:
        everyone = self._all(tensor)
        self._count("all_gather", 0)
        return torch.stack(everyone)

    def _exchange(self, kind: str, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        everyone = self._all(dict(zip(send_counts, send.split(list(send_counts.values())), strict=True)))
        received = {rank: parts[self.rank] for rank, parts in enumerate(everyone) if self.rank in parts}
        assert {rank: part.numel() for rank, part in received.items()} == receive_counts
        self._count(kind, (send.numel() - send_counts.get(self.rank, 0)) * send.element_size())
        return torch.cat([send[:0], *received.values()])

    def _all(self, value: Any) -> list[Any]:
        """What every rank has put here."""
        self._sent[self.rank] = value
        self.meet()
        everyone = list(self._sent)
        self.meet()  # before anyone puts something else
        return everyone


def run_threads(function: Callable[[ThreadRank], Any], world_size: int, device: torch.device) -> list[Any]:
    """Run a function on every rank; returns what it returned. The first error is raised here."""
    sent: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=60)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadRank(rank, sent, barrier, device))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results
