"""Re-tiling: flat pieces of factors become whole rows of tall factors, with one all-to-all for all adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BlockSpec
from .communication import Communicator
from .tiling import LocalShard, Tiling, tile

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
        self._places = list(self._list_places())
        self._exchanges: dict[tuple[tuple[bool, ...], ...], _Exchange] = {}

    @property
    def specs(self) -> list[BlockSpec]:
        """The blocks of this rank, in the order in which ``to_blocks`` returns them."""
        return [BlockSpec(place.factor // 2, place.factor % 2, place.shape) for place in self._places]

    def to_blocks(self, channels: Sequence[Channel], present: Sequence[Sequence[bool]]) -> list[list[Tensor | None]]:
        """Bring the local pieces of one or more channels into blocks.

        Args:
            channels: per channel the local tensor of every factor; None counts as zeros.
            present: per channel which factors take part, the same on every rank.

        Returns:
            Per channel the blocks in the order of ``specs``, None where a factor does not take part.

        Communication: one all-to-all if a factor that takes part is cut, otherwise none.
        """
        received = iter(self._exchange(present).forward(channels))
        blocks: list[list[Tensor | None]] = []
        for tensors, wanted in zip(channels, present, strict=True):
            blocks.append(
                [
                    _block(place, tensors[place.factor], received) if wanted[place.factor] else None
                    for place in self._places
                ]
            )
        return blocks

    def from_blocks(self, blocks: Sequence[Tensor | None], tensors: Channel, present: Sequence[bool]) -> None:
        """Write one channel's blocks, as ``to_blocks`` returned them and changed in place, back into ``tensors``.

        Communication: one all-to-all if a factor that takes part is cut, otherwise none.
        """
        moved = [b for b, place in zip(blocks, self._places, strict=True) if place.offset is None and b is not None]
        self._exchange([present]).backward(moved, tensors)

    def _exchange(self, present: Sequence[Sequence[bool]]) -> _Exchange:
        """Few sets of factors meet in an exchange (all, or those of one sub-group), and each is planned once."""
        key = tuple(tuple(wanted) for wanted in present)
        if key not in self._exchanges:
            entries = [
                (channel, factor)
                for channel, wanted in enumerate(key)
                for factor, tiling in enumerate(self._tilings)
                if wanted[factor] and tiling.exchanged
            ]
            self._exchanges[key] = _Exchange(entries, self._tilings, self._comm, self._dtype)
        return self._exchanges[key]

    def _list_places(self) -> Iterator[_Place]:
        for factor, tiling in enumerate(self._tilings):
            if tiling.direct is not None:
                yield _Place(factor, tiling.direct[1], tiling.direct[0])
            if tiling.received is not None:
                yield _Place(factor, tiling.received, None)


class _Place(NamedTuple):
    factor: int
    shape: tuple[int, int]
    offset: int | None  # of its first element in the local piece; None: it comes out of the exchange


def _block(place: _Place, tensor: Tensor | None, received: Iterator[Tensor]) -> Tensor | None:
    if place.offset is None:
        return next(received).view(place.shape)
    if tensor is None:
        return None
    numel = place.shape[0] * place.shape[1]
    if tensor.numel() == numel:
        return tensor.view(place.shape)  # never a copy, which would be changed in vain
    return tensor.view(-1)[place.offset : place.offset + numel].view(place.shape)


class _Exchange:
    """One all-to-all and its way back, for a fixed set of (channel, factor) entries.

    Elements travel ordered by the other rank, then entry, then position in the factor; the index tensors hold
    these permutations, so packing and unpacking are one gather each, whatever the number of adapters.
    """

    def __init__(
        self,
        entries: Sequence[tuple[int, int]],
        tilings: Sequence[Tiling],
        comm: Communicator,
        dtype: torch.dtype,
    ) -> None:
        self._comm = comm
        self._dtype = dtype
        self._entries = entries
        self._sent = [(channel, factor, *span) for channel, factor in entries for span in tilings[factor].sent]
        self._received_numel = [
            tilings[factor].sources.numel() for _, factor in entries if tilings[factor].received is not None
        ]
        self._targets = _concatenated([tilings[factor].targets for _, factor in entries])
        self._sources = _concatenated([tilings[factor].sources for _, factor in entries])
        self._send_counts = _counts(self._targets, comm.world_size)
        self._receive_counts = _counts(self._sources, comm.world_size)

    # Built when first used: weights are never sent back, so half of them would only take memory.

    @functools.cached_property
    def _pack(self) -> Tensor:
        return _order(self._targets, self._comm)

    @functools.cached_property
    def _unpack(self) -> Tensor:
        return _inverse_order(self._sources, self._comm)

    @functools.cached_property
    def _pack_return(self) -> Tensor:
        return _order(self._sources, self._comm)

    @functools.cached_property
    def _unpack_returned(self) -> Tensor:
        return _inverse_order(self._targets, self._comm)

    def forward(self, channels: Sequence[Channel]) -> list[Tensor]:
        """Send pieces, return the received blocks, flat."""
        if not self._entries:
            return []
        nothing = torch.zeros(0, dtype=self._dtype, device=self._comm.shard_device)
        pieces = [nothing]  # a rank may hold no piece at all, and still takes part
        for channel, factor, start, stop in self._sent:
            tensor = channels[channel][factor]
            pieces.append(nothing.new_zeros(stop - start) if tensor is None else tensor.reshape(-1)[start:stop])
        packed = torch.cat(pieces).to(self._comm.device, non_blocking=True).index_select(0, self._pack)
        arrived = self._comm.all_to_all(packed, self._send_counts, self._receive_counts)
        return list(arrived.index_select(0, self._unpack).split(self._received_numel))

    def backward(self, blocks: Sequence[Tensor], tensors: Channel) -> None:
        """Send received blocks back and write them into the pieces that they came from."""
        if not self._entries:
            return
        nothing = torch.zeros(0, dtype=self._dtype, device=self._comm.device)
        flat = torch.cat([nothing, *(block.reshape(-1) for block in blocks)])
        packed = flat.index_select(0, self._pack_return)
        returned = self._comm.all_to_all(packed, self._receive_counts, self._send_counts)
        returned = returned.index_select(0, self._unpack_returned).to(self._comm.shard_device)
        values = returned.split([stop - start for *_, start, stop in self._sent])
        targets, kept = [], []
        for (_, factor, start, stop), value in zip(self._sent, values, strict=True):
            tensor = tensors[factor]
            if tensor is not None:
                targets.append(tensor.view(-1)[start:stop])
                kept.append(value)
        if targets:
            torch._foreach_copy_(targets, kept)


def _concatenated(ranks: Sequence[Tensor]) -> Tensor:
    flat = torch.cat([torch.empty(0, dtype=torch.int16), *ranks])
    assert flat.numel() < 2**31, "32-bit indices cannot address the exchange"
    return flat


def _counts(ranks: Tensor, world_size: int) -> list[int]:
    return torch.bincount(ranks.to(torch.int64), minlength=world_size).tolist()


def _order(ranks: Tensor, comm: Communicator) -> Tensor:
    """The order that sorts elements by rank, int32 on the communication device."""
    return torch.sort(ranks, stable=True).indices.to(comm.device, torch.int32)


def _inverse_order(ranks: Tensor, comm: Communicator) -> Tensor:
    order = torch.sort(ranks, stable=True).indices
    inverse = torch.empty(order.numel(), dtype=torch.int32)
    inverse[order] = torch.arange(order.numel(), dtype=torch.int32)
    return inverse.to(comm.device)
