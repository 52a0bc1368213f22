"""Ranks as threads of one process, for exchanges over layouts that no engine has to be built for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reflora_dist.communication import Communicator


class ThreadRank(Communicator):
    """A rank whose all-to-all goes through the process's memory.

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

    def all_to_all(
        self, send: Tensor, send_counts: list[int], receive_counts: list[int], out: Tensor | None = None
    ) -> Tensor:
        self._sent[self.rank] = send.split(send_counts)
        self.meet()
        received = [parts[self.rank] for parts in self._sent]
        assert [part.numel() for part in received] == receive_counts
        arrived = torch.cat(received)
        self.meet()  # before anyone uses its memory again
        self._count("all_to_all", (send.numel() - send_counts[self.rank]) * send.element_size())
        return arrived if out is None else out.copy_(arrived)


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
