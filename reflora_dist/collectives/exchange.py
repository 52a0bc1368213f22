"""An exchange of pieces of tensors between ranks, and its reverse: packing, sending, unpacking."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .communicator import Communicator, Counts
from .tiling import Run, Tiling

Channel = Sequence[Tensor | None]
"""The local tensor of every factor: all weights, for example, or all gradients."""


class _SentRun(NamedTuple):
    """Elements ``[start, stop)`` of a local tensor that go to ``peer``."""

    peer: int
    channel: int
    factor: int
    start: int
    stop: int
    whole: bool  # whether they are the whole tensor


class Exchange:
    """One exchange and its reverse, for a fixed set of (channel, factor) entries.

    On the wire, elements are ordered by the other rank, then by entry, then by position in the factor. Senders collect
    their pieces in that order. Receivers reorder *grains*, the largest runs of equal size that stay together, into
    blocks; one gather does that, whatever the number of adapters.

    Args:
        entries: the (channel, factor) entries that take part, the same on all ranks.
        tilings: the tiling of every factor.
        local_numel: number of elements of every factor that this rank holds.
        comm: carries the exchange.
        dtype: dtype of elements on the wire.
        among_neighbours: whether every rank sends to few others, point to point instead of all-to-all.

    Attributes:
        takes_part: whether there is anything to exchange; otherwise nothing is sent.
    """

    def __init__(
        self,
        entries: Sequence[tuple[int, int]],
        tilings: Sequence[Tiling],
        local_numel: Sequence[int],
        comm: Communicator,
        dtype: torch.dtype,
        among_neighbours: bool,
    ) -> None:
        self._comm = comm
        self._dtype = dtype
        self._send = comm.between_neighbours if among_neighbours else comm.all_to_all
        sent = [
            _SentRun(
                run.peer, channel, factor, run.start, run.start + run.numel, whole=run.numel == local_numel[factor]
            )
            for channel, factor in entries
            for run in tilings[factor].sent
        ]
        self._sent = sorted(sent, key=lambda run: run.peer)
        self._sent_numel = [run.stop - run.start for run in self._sent]
        self._send_counts: Counts = {}
        for run, numel in zip(self._sent, self._sent_numel, strict=True):
            self._send_counts[run.peer] = self._send_counts.get(run.peer, 0) + numel
        received = [tilings[factor] for _, factor in entries]
        self._block_numel = [math.prod(tiling.received) for tiling in received if tiling.received is not None]
        self._incoming = _Runs([run for tiling in received for run in tiling.arriving])
        self.takes_part = bool(entries)

    # Both orders are built when first used. Weights are never sent back, and an unused order would only take memory.

    @functools.cached_property
    def _unpack(self) -> Tensor:
        return self._incoming.from_wire().to(self._comm.device)

    @functools.cached_property
    def _pack(self) -> Tensor:
        return self._incoming.to_wire().to(self._comm.device)

    def forward(self, channels: Sequence[Channel]) -> list[Tensor]:
        """Send pieces, and return the received blocks.

        Args:
            channels: per channel the local tensor of every factor; None counts as zeros.

        Returns:
            One flat tensor for each block, in the order of ``entries``.

        Communication: one exchange.
        """
        if not self.takes_part:
            return []
        flat = [torch.empty(0, dtype=self._dtype, device=self._comm.shard_device)]  # a rank may send nothing
        for piece, numel in zip(self._pieces(channels), self._sent_numel, strict=True):
            flat.append(flat[0].new_zeros(numel) if piece is None else piece.reshape(-1).to(self._dtype))
        sent = torch.cat(flat).to(self._comm.device, non_blocking=True)
        arrived = self._send(sent, self._send_counts, self._incoming.counts)
        return list(self._ordered(arrived, self._unpack).split(self._block_numel))

    def backward(self, blocks: Sequence[Tensor], channels: Sequence[Channel]) -> None:
        """Send received blocks back, and write them into the pieces that they came from.

        Args:
            blocks: as :meth:`forward` returned them; their values may have changed.
            channels: per channel the local tensors to write to; None is skipped.

        Communication: one exchange.
        """
        if not self.takes_part:
            return
        flat = torch.empty(0, dtype=self._dtype, device=self._comm.device)
        flat = torch.cat([flat, *(block.reshape(-1) for block in blocks)])
        returned = self._send(self._ordered(flat, self._pack), self._incoming.counts, self._send_counts)
        parts = returned.to(self._comm.shard_device).split(self._sent_numel)
        pairs = [(p.view(-1), part) for p, part in zip(self._pieces(channels), parts, strict=True) if p is not None]
        if pairs:
            torch._foreach_copy_([piece for piece, _ in pairs], [part for _, part in pairs])

    def _pieces(self, channels: Sequence[Channel]) -> list[Tensor | None]:
        """Return views of the elements that take part; writes to copies would be lost."""
        return [
            tensor
            if (tensor := channels[run.channel][run.factor]) is None or run.whole
            else tensor.view(-1)[run.start : run.stop]
            for run in self._sent
        ]

    def _ordered(self, flat: Tensor, index: Tensor) -> Tensor:
        return flat.view(-1, self._incoming.grain).index_select(0, index).view(-1)


class _Runs:
    """Incoming runs of elements: their order in the blocks, and their order on the wire."""

    def __init__(self, runs: Sequence[Run]) -> None:
        peers = torch.tensor([run.peer for run in runs], dtype=torch.int64)
        self._numels = torch.tensor([run.numel for run in runs], dtype=torch.int64)
        self._order = torch.sort(peers, stable=True).indices
        self.counts: Counts = {}
        for run in sorted(runs, key=lambda run: run.peer):
            self.counts[run.peer] = self.counts.get(run.peer, 0) + run.numel
        # A run begins where whole runs end, so the common divisor of the sizes divides every position.
        self.grain: int = max(1, math.gcd(*torch.unique(self._numels).tolist()))

    def to_wire(self) -> Tensor:
        """Return the place in the blocks of every grain on the wire, ``[grains]`` int64."""
        starts = self._numels.cumsum(0) - self._numels
        return _expand(starts[self._order] // self.grain, self._numels[self._order] // self.grain)

    def from_wire(self) -> Tensor:
        """Return the place on the wire of every grain in the blocks, ``[grains]`` int64."""
        numels = self._numels[self._order]
        starts = torch.empty_like(self._numels)
        starts[self._order] = numels.cumsum(0) - numels
        return _expand(starts // self.grain, self._numels // self.grain)


def _expand(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return ``[start, start + 1, ..., start + length - 1]`` for every start, concatenated; int64."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))
