"""Re-tiling: flat pieces of factors become whole rows of tall factors, with one all-to-all for all adapters."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BlockSpec, stack_view
from .communication import Communicator
from .tiling import LocalShard, Run, Tiling, tile

Channel = Sequence[Tensor | None]
"""The local tensor of every factor: the weights, or the gradients."""


class Retiler:
    """Moves weights and gradients between the shards of an engine and blocks that products can be formed on.

    A factor that no rank has to send stays in place, and its blocks are views.

    Args:
        shapes: whole shape of every factor, ``(r, in)`` and ``(out, r)`` alternating.
        shards: ``shards[rank][factor]``, for every rank of the communicator's group.
        communicator: carries the exchange.
        dtype: of elements on the wire, float32 or float64, the same on all ranks.

    Raises:
        ValueError: the ranks' shards do not tile a factor exactly.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Sequence[LocalShard]],
        communicator: Communicator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._comm = communicator
        self._dtype = dtype
        # Layers repeat, and under most engines so do their tilings.
        plan = functools.cache(tile)
        self._tilings = [
            plan(factor % 2, shape, tuple(rank_shards[factor] for rank_shards in shards), communicator.rank)
            for factor, shape in enumerate(shapes)
        ]
        # Factors of one shape follow each other, so that what the exchange brings is one stack of blocks per shape.
        self._order = sorted(range(len(shapes)), key=lambda factor: shapes[factor]) if self._cut else range(len(shapes))
        self._places = list(self._list_places())
        self._local_numel = local_numel = [shard.numel for shard in shards[communicator.rank]]
        # then blocks are the tensors themselves, and a step has nothing to prepare
        self._in_place = [(place.factor, place.offset, place.numel) for place in self._places] == [
            (factor, 0, numel) for factor, numel in enumerate(local_numel)
        ] and not self._cut
        self._exchanges: dict[tuple[tuple[bool, ...], ...], _Exchange] = {}

    @property
    def _cut(self) -> bool:
        return any(tiling.exchanged for tiling in self._tilings)

    @property
    def specs(self) -> list[BlockSpec]:
        """The blocks of this rank, in the order in which ``to_blocks`` returns them."""
        return [BlockSpec(place.factor // 2, place.factor % 2, place.shape) for place in self._places]

    def to_blocks(
        self,
        channels: Sequence[Channel],
        present: Sequence[Sequence[bool]],
        communicator: Communicator | None = None,
    ) -> list[list[Tensor | None]]:
        """Bring the local pieces of one or more channels into blocks.

        Args:
            channels: per channel the local tensor of every factor; None counts as zeros.
            present: per channel which factors take part, the same on every rank.
            communicator: over the same ranks, in place of the one given at first.

        Returns:
            Per channel the blocks in the order of ``specs``, None where a factor does not take part: contiguous, of the
            specified number of elements but possibly of another number of dimensions. In host memory, blocks that an
            exchange brought are overwritten by the next one of the same factors.

        Communication: one all-to-all if a factor that takes part is cut, otherwise none.
        """
        if self._in_place:
            return [
                list(tensors) if all(wanted) else [t if w else None for t, w in zip(tensors, wanted, strict=True)]
                for tensors, wanted in zip(channels, present, strict=True)
            ]
        received = iter(self._exchange(present).forward(channels, communicator or self._comm))
        blocks: list[list[Tensor | None]] = []
        for tensors, wanted in zip(channels, present, strict=True):
            blocks.append(
                [
                    _block(place, tensors[place.factor], received) if wanted[place.factor] else None
                    for place in self._places
                ]
            )
        return blocks

    def from_blocks(
        self,
        blocks: Sequence[Sequence[Tensor | None]],
        channels: Sequence[Channel],
        present: Sequence[Sequence[bool]],
    ) -> None:
        """Write blocks, as ``to_blocks`` returned them and changed in place, back into the channels' tensors.

        Communication: one all-to-all if a factor that takes part is cut, otherwise none.
        """
        if self._in_place:
            return
        moved = [
            block
            for of_channel in blocks
            for block, place in zip(of_channel, self._places, strict=True)
            if place.offset is None and block is not None
        ]
        self._exchange(present).backward(moved, channels)

    def _exchange(self, present: Sequence[Sequence[bool]]) -> _Exchange:
        """Few sets of factors meet in an exchange (all, or those of one sub-group), and each is planned once."""
        key = tuple(tuple(wanted) for wanted in present)
        if key not in self._exchanges:
            entries = [
                (channel, factor)
                for channel, wanted in enumerate(key)
                for factor in self._order
                if wanted[factor] and self._tilings[factor].exchanged
            ]
            self._exchanges[key] = _Exchange(entries, self._tilings, self._local_numel, self._comm, self._dtype)
        return self._exchanges[key]

    def _list_places(self) -> Iterator[_Place]:
        for factor in self._order:
            tiling = self._tilings[factor]
            if tiling.direct is not None:
                yield _Place(factor, tiling.direct[1], tiling.direct[0])
            if tiling.received is not None:
                yield _Place(factor, tiling.received, None)


class _Place(NamedTuple):
    factor: int
    shape: tuple[int, int]
    offset: int | None  # of its first element in the local piece; None: it comes out of the exchange

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def _block(place: _Place, tensor: Tensor | None, received: Iterator[Tensor]) -> Tensor | None:
    if place.offset is None:
        return next(received)
    if tensor is None:
        return None
    if tensor.numel() == place.numel:
        return tensor
    return tensor.view(-1)[place.offset : place.offset + place.numel]  # never a copy, which would be changed in vain


class _Span(NamedTuple):
    """A stretch of a local tensor that takes part in an exchange."""

    channel: int
    factor: int
    start: int
    stop: int
    whole: bool  # it is all of the tensor

    def of(self, channels: Sequence[Channel]) -> Tensor | None:
        tensor = channels[self.channel][self.factor]
        # never a copy, into which nothing may be written
        return tensor if self.whole or tensor is None else tensor.view(-1)[self.start : self.stop]


class _Exchange:
    """One all-to-all and its way back, for a fixed set of (channel, factor) entries.

    Elements travel ordered by the other rank, then entry, then position in the factor. They are packed and unpacked
    in *grains*, the largest pieces of equal size that stay together everywhere, with one gather each, whatever the
    number of adapters.
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
        self._spans = [
            _Span(channel, factor, start, stop, whole=(start, stop) == (0, local_numel[factor]))
            for channel, factor in entries
            for start, stop in _spans(tilings[factor].sent)
        ]
        self._span_numel = [span.stop - span.start for span in self._spans]
        self._span_views: list[Tensor] = []
        blocks = [tilings[factor] for _, factor in entries if tilings[factor].received is not None]
        self._received_shapes = [tiling.received for tiling in blocks if tiling.received is not None]
        self._received_numel = [rows * columns for rows, columns in self._received_shapes]
        self._received: list[Tensor] = []
        sent = [tilings[factor].sent for _, factor in entries]
        # Runs as they lie in the concatenated pieces, and in the concatenated blocks.
        outgoing = _Runs([run for runs in sent for run in runs], comm.world_size)
        incoming = _Runs([run for tiling in blocks for run in tiling.arriving], comm.world_size)
        self._send_counts, self._receive_counts = outgoing.counts, incoming.counts
        self._grain = max(1, math.gcd(outgoing.grain, incoming.grain))
        self._outgoing, self._incoming = outgoing, incoming
        largest = max(sum(outgoing.counts), sum(incoming.counts))
        self._memory = [_Memory(largest, dtype), _Memory(largest, dtype)]

    # Built when first used: weights are never sent back, so half of them would only take memory.

    @functools.cached_property
    def _pack(self) -> Tensor:
        return self._outgoing.to_wire(self._grain).to(self._comm.device)

    @functools.cached_property
    def _unpack(self) -> Tensor:
        return self._incoming.from_wire(self._grain).to(self._comm.device)

    @functools.cached_property
    def _pack_return(self) -> Tensor:
        return self._incoming.to_wire(self._grain).to(self._comm.device)

    @functools.cached_property
    def _unpack_returned(self) -> Tensor:
        return self._outgoing.from_wire(self._grain).to(self._comm.device)

    def forward(self, channels: Sequence[Channel], comm: Communicator) -> list[Tensor]:
        """Send pieces, return the received blocks."""
        if not self._entries:
            return []
        sent = self._collect([span.of(channels) for span in self._spans])
        packed = self._gather(sent.to(self._comm.device, non_blocking=True), self._pack, self._memory[1])
        room = self._memory[0].take(sum(self._receive_counts), self._comm.device)
        arrived = comm.all_to_all(packed, self._send_counts, self._receive_counts, out=room)
        return self._split(self._gather(arrived, self._unpack, self._memory[1]))

    def backward(self, blocks: Sequence[Tensor], channels: Sequence[Channel]) -> None:
        """Send received blocks back and write them into the pieces that they came from."""
        if not self._entries:
            return
        if blocks:
            flat = stack_view(blocks)
            if flat is None:
                flat = torch.cat([block.reshape(-1) for block in blocks])
        else:
            flat = self._memory[1].take(0, self._comm.device)
        packed = self._gather(flat, self._pack_return, self._memory[0])
        room = self._memory[1].take(sum(self._send_counts), self._comm.device)
        returned = self._comm.all_to_all(packed, self._receive_counts, self._send_counts, out=room)
        returned = self._gather(returned, self._unpack_returned, self._memory[0]).to(self._comm.shard_device)
        self._copy([span.of(channels) for span in self._spans], returned, to_pieces=True)

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
        kept = self._comm.device.type == "cpu"  # flat is the same memory in every step: views of it last
        views = self._span_views if kept and self._span_views else list(flat.split(self._span_numel))
        for index, piece in enumerate(pieces):
            if piece is not None and views[index].shape != piece.shape:
                views[index] = views[index].view(piece.shape)
        if kept:
            self._span_views = views
        present = [piece for piece in pieces if piece is not None]
        if len(present) < len(pieces):
            views = [view for view, piece in zip(views, pieces, strict=True) if piece is not None]
        if present:
            torch._foreach_copy_(*((present, views) if to_pieces else (views, present)))

    def _gather(self, flat: Tensor, index: Tensor, memory: _Memory) -> Tensor:
        out = memory.take(index.numel() * self._grain, flat.device)
        torch.index_select(flat.view(-1, self._grain), 0, index, out=out.view(-1, self._grain))
        return out

    def _split(self, flat: Tensor) -> list[Tensor]:
        if flat.device.type != "cpu":
            return list(flat.split(self._received_numel))
        if not self._received:  # where memory is kept, so are views of it
            pieces = flat.split(self._received_numel)
            self._received = [piece.view(shape) for piece, shape in zip(pieces, self._received_shapes, strict=True)]
        return self._received


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
    """Runs of elements in local order, and the order in which they travel."""

    def __init__(self, runs: Sequence[Run], world_size: int) -> None:
        peers = torch.tensor([run.peer for run in runs], dtype=torch.int64)
        self._numels = torch.tensor([run.numel for run in runs], dtype=torch.int64)
        self._order = torch.sort(peers, stable=True).indices
        counts = torch.zeros(world_size, dtype=torch.int64).index_add_(0, peers, self._numels)
        self.counts: list[int] = counts.tolist()
        assert sum(self.counts) < 2**31, "32-bit indices cannot address the exchange"
        # Wherever a run begins, all before it are whole runs: so their sizes' divisor divides every position.
        self.grain: int = math.gcd(*torch.unique(self._numels).tolist())

    def to_wire(self, grain: int) -> Tensor:
        """For every grain on the wire its place in local order, int32."""
        starts = self._numels.cumsum(0) - self._numels
        return _expand(starts[self._order] // grain, self._numels[self._order] // grain)

    def from_wire(self, grain: int) -> Tensor:
        """For every grain in local order its place on the wire, int32."""
        numels = self._numels[self._order]
        starts = torch.empty_like(self._numels)
        starts[self._order] = numels.cumsum(0) - numels
        return _expand(starts // grain, self._numels // grain)


def _expand(starts: Tensor, lengths: Tensor) -> Tensor:
    """``[s, s + 1, ..., s + length - 1]`` of every start, concatenated."""
    before = lengths.cumsum(0) - lengths
    return (torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))).to(torch.int32)


def _spans(runs: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """The stretches of a piece that runs cover, neighbours joined."""
    start = stop = 0
    for run in runs:
        if run.start != stop:
            if stop > start:
                yield start, stop
            start = run.start
        stop = run.start + run.numel
    if stop > start:
        yield start, stop
