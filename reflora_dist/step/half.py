"""The guard of float16's range: a pair whose new values would exceed 65504 keeps its old ones, on all ranks alike.

Factors of unequal norm enlarge the refactored gradients by the ratio of their norms. float32 and bfloat16 can hold
these values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.tensor_lists import PerTensor
from ..collectives.communicator import Communicator
from ..collectives.exchange import Channel

FLAG_BYTES = 4  # per pair, in the all-reduce


class HalfGuard:
    """Copies tensors before a change and restores those of every pair that is not finite after it.

    Args:
        communicator: made for the ranks that together hold one copy of every factor.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._comm = communicator
        self._per_tensor = PerTensor(communicator.shard_device)
        self._nothing = torch.empty(0, dtype=torch.float16, device=communicator.shard_device)
        self._channels: list[list[Tensor]] = []
        self._before: list[list[Tensor]] = []

    def keep(self, channels: Sequence[Channel]) -> None:
        """Copy tensors that are about to change in place.

        Args:
            channels: per channel the local tensor of every factor, or None.
        """
        self._channels = [[self._nothing if tensor is None else tensor for tensor in channel] for channel in channels]
        self._before = [[tensor.clone() for tensor in channel] for channel in self._channels]

    def restore(self, also: Tensor | None = None, never: Tensor | None = None) -> Tensor:
        """Restore all tensors of every pair with an element that is not finite on any rank.

        A pair that was not finite before the change is restored too, bit for bit.

        Args:
            also: ``[P]`` bool, pairs to restore in any case; the same on all ranks.
            never: ``[P]`` bool, pairs to leave as they are now; the same on all ranks. It overrides ``also``.

        Returns:
            ``[P]`` bool, the pairs that were restored; the same on all ranks.

        Communication: one all-reduce of an int32 per pair; none if every rank holds the factors whole.
        """
        tensors = [tensor for channel in self._channels for tensor in channel]
        finite = torch.isfinite(self._per_tensor.magnitudes(tensors))
        per_pair = finite.view(len(self._channels), -1, 2).all(dim=2).all(dim=0)
        (broken,) = self._comm.all_reduce([(~per_pair).to(self._comm.device, torch.int32)])
        unchanged = broken > 0
        if also is not None:
            unchanged |= also
        if never is not None:
            unchanged &= ~never
        self._put_back(unchanged)
        return unchanged

    def _put_back(self, pairs: Tensor) -> None:
        flags = {device: pairs.to(device).unbind() for device in {t.device for c in self._channels for t in c}}
        for channel, before in zip(self._channels, self._before, strict=True):
            for factor, (tensor, old) in enumerate(zip(channel, before, strict=True)):
                if tensor.numel():
                    torch.where(flags[tensor.device][factor // 2], old, tensor, out=tensor)
        self._channels, self._before = [], []
