"""An all-to-all of pieces of tensors, and its way back: packing, sending, unpacking."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import stack_view
from .communication import Communicator
from .tiling import Run, Tiling

Channel = Sequence[Tensor | None]
"""The local tensor of every factor: the weights, or the gradients."""


class _Span(NamedTuple):
    """A stretch of a local tensor that takes part in an exchange."""

    peer: int
    channel: int
    item: int
    start: int
    stop: int
    whole: bool  # it is all of the tensor


class Exchange:
    """One all-to-all and its way back, for a fixed set of (channel, item) entries.

    Elements travel ordered by the other rank, then entry, then position in the item. Senders collect their pieces in
    that order; the owners bring what arrives into blocks in *grains*, the largest pieces of equal size that stay
    together, with one gather whatever the number of adapters.

    Args:
        entries: what takes part: an item of a channel is a factor, or a message.
        tilings: of every item.
        local_numel: elements that this rank holds of every item.
        comm: carries the exchange.
        dtype: of elements on the wire.
    """

    def __init__(
        self,
        entries: Sequence[tuple[int, int]],
        tilings: Sequence[Tiling],
        local_numel: Sequence[int],
        comm: Communicator,
        dtype: torch.dtype,
    ) -> None:
        self._comm = comm
        self._entries = entries
        spans = [
            _Span(run.peer, channel, item, run.start, run.start + run.numel, whole=run.numel == local_numel[item])
            for channel, item in entries
            for run in tilings[item].sent
        ]
        self._spans = sorted(spans, key=lambda span: span.peer)
        self._span_numel = [span.stop - span.start for span in self._spans]
        self._span_views: list[Tensor] = []
        self._flat_views = list(range(len(spans)))  # those that do not have their tensor's shape yet
        self._send_counts = [0] * comm.world_size
        for span, numel in zip(self._spans, self._span_numel, strict=True):
            self._send_counts[span.peer] += numel
        received = [tilings[item] for _, item in entries if tilings[item].received is not None]
        self._block_shapes = [tiling.received for tiling in received if tiling.received is not None]
        self._block_numel = [rows * columns for rows, columns in self._block_shapes]
        self._blocks: list[Tensor] = []
        self._incoming = _Runs([run for tiling in received for run in tiling.arriving], comm.world_size)
        largest = max(sum(self._send_counts), sum(self._incoming.counts))
        assert largest < 2**31, "32-bit indices cannot address the exchange"
        self._memory = [_Memory(largest, dtype), _Memory(largest, dtype)]

    # Built when first used: weights are never sent back, so half of them would only take memory.

    @functools.cached_property
    def _unpack(self) -> Tensor:
        return self._incoming.from_wire().to(self._comm.device)

    @functools.cached_property
    def _pack(self) -> Tensor:
        return self._incoming.to_wire().to(self._comm.device)

    def forward(self, channels: Sequence[Channel], comm: Communicator) -> list[Tensor]:
        """Send pieces, return the received blocks."""
        if not self._entries:
            return []
        sent = self._collect(self._pieces(channels))
        room = self._memory[1].take(sum(self._incoming.counts), self._comm.device)
        sent = sent.to(self._comm.device, non_blocking=True)
        arrived = comm.all_to_all(sent, self._send_counts, self._incoming.counts, out=room)
        return self._split(self._gather(arrived, self._unpack, self._memory[0]))

    def backward(self, blocks: Sequence[Tensor], channels: Sequence[Channel], comm: Communicator) -> None:
        """Send received blocks back and write them into the pieces that they came from."""
        if not self._entries:
            return
        if blocks:
            flat = stack_view(blocks)
            if flat is None:
                flat = torch.cat([block.reshape(-1) for block in blocks])
        else:
            flat = self._memory[0].take(0, self._comm.device)
        packed = self._gather(flat, self._pack, self._memory[1])
        room = self._memory[0].take(sum(self._send_counts), self._comm.device)
        returned = comm.all_to_all(packed, self._incoming.counts, self._send_counts, out=room)
        self._copy(self._pieces(channels), returned.to(self._comm.shard_device), to_pieces=True)

    def _pieces(self, channels: Sequence[Channel]) -> list[Tensor | None]:
        """What of the tensors takes part, never a copy, into which nothing may be written."""
        return [
            tensor
            if (tensor := channels[span.channel][span.item]) is None or span.whole
            else tensor.view(-1)[span.start : span.stop]
            for span in self._spans
        ]

    def _collect(self, pieces: list[Tensor | None]) -> Tensor:
        """Pieces one behind the other on their device, zeros for None."""
        room = self._memory[0].take(sum(self._span_numel), self._comm.shard_device)
        if room.device.type != "cpu":
            flat = [room[:0]]  # a rank may hold no piece at all, and still takes part
            for piece, numel in zip(pieces, self._span_numel, strict=True):
                flat.append(room.new_zeros(numel) if piece is None else piece.reshape(-1))
            return torch.cat(flat, out=room)
        if any(piece is None for piece in pieces):
            room.zero_()
        self._copy(pieces, room, to_pieces=False)
        return room

    def _copy(self, pieces: list[Tensor | None], flat: Tensor, *, to_pieces: bool) -> None:
        """Copy between pieces and the memory in which they lie one behind the other."""
        if self._comm.device.type == "cpu":  # flat is the same memory in every step: views of it last
            self._span_views = views = self._span_views or list(flat.split(self._span_numel))
            for index in self._flat_views:
                if (piece := pieces[index]) is not None:
                    views[index] = views[index].view(piece.shape)
            self._flat_views = [index for index in self._flat_views if pieces[index] is None]
        else:
            views = list(flat.split(self._span_numel))
            pieces = [None if piece is None else piece.view(-1) for piece in pieces]
        present = [piece for piece in pieces if piece is not None]
        if len(present) < len(pieces):
            views = [view for view, piece in zip(views, pieces, strict=True) if piece is not None]
        if present:
            torch._foreach_copy_(*((present, views) if to_pieces else (views, present)))

    def _gather(self, flat: Tensor, index: Tensor, memory: _Memory) -> Tensor:
        out = memory.take(sum(self._incoming.counts), flat.device)
        grain = self._incoming.grain
        torch.index_select(flat.view(-1, grain), 0, index, out=out.view(-1, grain))
        return out

    def _split(self, flat: Tensor) -> list[Tensor]:
        if flat.device.type != "cpu":
            return list(flat.split(self._block_numel))
        if not self._blocks:  # where memory is kept, so are views of it
            pieces = flat.split(self._block_numel)
            self._blocks = [piece.view(shape) for piece, shape in zip(pieces, self._block_shapes, strict=True)]
        return self._blocks


class _Memory:
    """Room that an exchange uses again in every step, in host memory: the system would hand it out page by page.

    On a GPU it is torch's allocator that keeps it, for everyone.

    Args:
        numel: elements that are taken at most.
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._numel = numel
        self._dtype = dtype
        self._kept: Tensor | None = None

    def take(self, numel: int, device: torch.device) -> Tensor:
        """So many elements, of any value."""
        if device.type != "cpu":
            return torch.empty(numel, dtype=self._dtype, device=device)
        if self._kept is None:
            self._kept = torch.empty(self._numel, dtype=self._dtype)
        return self._kept[:numel]


class _Runs:
    """Runs of elements in the order of blocks, and the order in which they travel."""

    def __init__(self, runs: Sequence[Run], world_size: int) -> None:
        peers = torch.tensor([run.peer for run in runs], dtype=torch.int64)
        self._numels = torch.tensor([run.numel for run in runs], dtype=torch.int64)
        self._order = torch.sort(peers, stable=True).indices
        counts = torch.zeros(world_size, dtype=torch.int64).index_add_(0, peers, self._numels)
        self.counts: list[int] = counts.tolist()
        # Wherever a run begins, all before it are whole runs: so their sizes' divisor divides every position.
        self.grain: int = max(1, math.gcd(*torch.unique(self._numels).tolist()))

    def to_wire(self) -> Tensor:
        """For every grain on the wire its place in the blocks, int32."""
        starts = self._numels.cumsum(0) - self._numels
        return _expand(starts[self._order] // self.grain, self._numels[self._order] // self.grain)

    def from_wire(self) -> Tensor:
        """For every grain of the blocks its place on the wire, int32."""
        numels = self._numels[self._order]
        starts = torch.empty_like(self._numels)
        starts[self._order] = numels.cumsum(0) - numels
        return _expand(starts // self.grain, self._numels // self.grain)


def _expand(starts: Tensor, lengths: Tensor) -> Tensor:
    """``[s, s + 1, ..., s + length - 1]`` of every start, concatenated."""
    before = lengths.cumsum(0) - lengths
    return (torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))).to(torch.int32)
