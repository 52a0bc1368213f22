"""S formed ahead: right after an update, on a GPU on a stream of its own beside the next forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .communication import Communicator
from .per_tensor import PerTensor
from .solving import Solution

Versions = list[tuple[int, int]]
"""Of ``Engine.versions``."""


class Ahead:
    """Keeps a Solution until the step that it is for, unless the weights change in between.

    A change that torch can see (an in-place operation, a replaced tensor) drops it in one process. Among several ranks
    it raises: one that goes on alone would leave the others waiting for collectives. A change behind torch's back
    (through ``tensor.data``) shows in the weights' norms, which are compared without waiting for the device:
    :meth:`check` raises.

    Args:
        communicator: for collectives beside those of the forward and backward, over a process group of its own.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        device = communicator.device
        self._per_tensor = PerTensor(communicator.shard_device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._solution: Solution | None = None
        self._versions: Versions = []
        self._norms = torch.empty(0)
        self._unseen = torch.zeros((), dtype=torch.int64, device=device)

    @contextlib.contextmanager
    def forming(self, weights: Sequence[Tensor], versions: Versions) -> Iterator[Communicator]:
        """Run the block beside what follows; it has to end with :meth:`keep`."""
        self._versions = versions
        if self._stream is None:
            self._norms = self._per_tensor.magnitudes(weights)
            yield self.communicator
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._norms = self._per_tensor.magnitudes(weights)
            yield self.communicator

    def keep(self, solution: Solution) -> None:
        """Keep what was formed."""
        self._solution = solution

    def take(self, weights: Sequence[Tensor], versions: Versions) -> Solution | None:
        """What was formed for these weights, or None."""
        self._wait()  # also where nothing is kept: the weights may still be read, and are updated next
        solution, self._solution = self._solution, None
        if solution is None:
            return None
        if versions != self._versions:
            if self.communicator.world_size > 1:
                raise RuntimeError(
                    "factors were changed between two steps: with overlap=True call handle.weights_changed() on every "
                    "rank after changing them"
                )
            return None
        now, then = self._per_tensor.magnitudes(weights), self._norms
        changed = (now != then) & ~(now.isnan() & then.isnan())
        self._unseen += changed.any().to(self._unseen.device, non_blocking=True)
        if self._stream is None:
            self.check()
        return solution

    def _wait(self) -> None:
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        if self._solution is not None:  # used on one stream, allocated on another
            whole, owned, grams = self._solution
            for matrices in (*whole, *(owned or ()), grams):
                for matrix in matrices.values():
                    matrix.record_stream(current)

    def close(self) -> None:
        """Forget what was formed and give the communicator back. Every rank must call."""
        self.drop()
        if self._stream is not None:
            self._stream.synchronize()
        self.communicator.close()

    def drop(self) -> None:
        """Forget what was formed."""
        self._solution = None

    def check(self) -> None:
        """Raise if weights were changed behind torch's back since the last check. Waits for the device."""
        if bool(self._unseen):
            self._unseen.zero_()
            raise RuntimeError(
                "factors were changed between two steps through tensor.data, unseen, and gradients were refactored "
                "with the S of the old ones: call handle.weights_changed() on every rank after changing them, or set "
                "RefLoRAConfig(overlap=False)"
            )
