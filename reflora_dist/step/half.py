"""float16 ends at 65504: a pair whose new values would lie beyond keeps its old ones, on all ranks alike.

Factors of unlike size make gradients larger by as much, which float32 and bfloat16 hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.tensor_lists import PerTensor
from ..collectives.communicator import Communicator
from ..collectives.exchange import Channel

FLAG_BYTES = 4  # of each pair, in the all-reduce


class HalfGuard:
    """Keeps what tensors are before a change, and puts it back where the change leaves a pair not finite.

    Args:
        communicator: over the ranks that together hold one copy of every factor.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._comm = communicator
        self._per_tensor = PerTensor(communicator.shard_device)
        self._nothing = torch.empty(0, dtype=torch.float16, device=communicator.shard_device)
        self._channels: list[list[Tensor]] = []
        self._before: list[list[Tensor]] = []

    def keep(self, channels: Sequence[Channel]) -> None:
        """Copy what is about to change in place: per channel the local tensor of every factor, or None."""
        self._channels = [[self._nothing if tensor is None else tensor for tensor in channel] for channel in channels]
        self._before = [[tensor.clone() for tensor in channel] for channel in self._channels]

    def restore(self, also: Tensor | None = None, never: Tensor | None = None) -> Tensor:
        """Put back all tensors of every pair of which one, on any rank, is not finite.

        That includes a pair that was not finite before: the optimizer gets its tensors bit for bit.

        Args:
            also: ``[P]`` bool, pairs to put back in any case; the same on all ranks.
            never: likewise, those not to put back.

        Returns:
            ``[P]`` bool, the pairs that are as they were; the same on all ranks.

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
