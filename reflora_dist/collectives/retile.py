"""Conversion of an engine's pieces of factors into blocks of whole rows, with at most one exchange for all adapters."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.types import BlockSpec
from .communicator import Communicator
from .exchange import Channel, Exchange
from .tiling import Layout, Shape, tile


class Retiler:
    """Moves weights and gradients between an engine's pieces and the blocks that a step computes on.

    Whole rows stay in place as *direct* blocks, which are views of a piece. Other elements travel, and form *received*
    blocks. A row that is cut goes to the neighbour that holds most of it. A factor that is stored as columns goes to
    one rank, its owner.

    Args:
        layouts: the layout of every factor, lora_A and lora_B alternating.
        communicator: carries the exchange.
        dtype: dtype of elements on the wire, float32 or float64, the same on all ranks.

    Attributes:
        dtype: as given.
        moves: whether any rank has to send anything (the same on all ranks).
        specs: the blocks of this rank in the order of ``to_blocks``, first direct, then received blocks.

    Raises:
        ValueError: a layout needs more ranks than there are.
    """

    def __init__(
        self, layouts: Sequence[Layout], communicator: Communicator, dtype: torch.dtype = torch.float32
    ) -> None:
        self._comm = communicator
        self.dtype = dtype
        for layout in layouts:
            if layout.holder(layout.numel - 1) >= communicator.world_size:
                raise ValueError(f"{layout} does not fit on {communicator.world_size} ranks")
        plan = functools.cache(tile)  # layers have equal layouts
        owners = [layout.owner(factor // 2, communicator.world_size) for factor, layout in enumerate(layouts)]
        self._tilings = [
            plan(layout, communicator.rank, owner if layout.columns else 0)
            for layout, owner in zip(layouts, owners, strict=True)
        ]
        self._moving = [layout.moves for layout in layouts]
        self.moves = any(self._moving)
        # a cut row concerns neighbouring ranks only, but columns may come from any rank
        self._among_neighbours = not any(
            layout.columns and moving for layout, moving in zip(layouts, self._moving, strict=True)
        )
        self._local_numel = [layout.piece(communicator.rank).numel for layout in layouts]
        self._direct = [
            _DirectBlock(
                factor, tiling.direct[1], tiling.direct[0], math.prod(tiling.direct[1]) == self._local_numel[factor]
            )
            for factor, tiling in enumerate(self._tilings)
            if tiling.direct is not None
        ]
        # blocks are then the tensors themselves, and a step needs no views
        self._in_place = len(self._direct) == len(layouts) and all(place.whole for place in self._direct)
        # Factors of one shape follow each other, so that the received blocks of a shape are one stack in memory.
        self._order = sorted(range(len(layouts)), key=lambda factor: (layouts[factor].columns, layouts[factor].shape))
        self._received = [
            (factor, shape) for factor in self._order if (shape := self._tilings[factor].received) is not None
        ]
        placed = [(place.factor, place.shape) for place in self._direct] + self._received
        self.specs = [
            BlockSpec(factor // 2, factor % 2, shape, layouts[factor].columns, layouts[factor].experts)
            for factor, shape in placed
        ]
        self._exchanges: dict[tuple[tuple[bool, ...], ...], Exchange] = {}

    def to_blocks(self, channels: Sequence[Channel], present: Sequence[Sequence[bool]]) -> list[list[Tensor | None]]:
        """Convert the local pieces of one or more channels into blocks.

        Args:
            channels: per channel the local tensor of every factor; None counts as zeros.
            present: per channel and factor, whether the factor takes part; the same on all ranks.

        Returns:
            Per channel the blocks in the order of ``specs``, None for a factor that does not take part. A block is
            contiguous and has the number of elements of its spec, but may have another number of dimensions.

        Communication: one exchange if a factor that takes part moves, otherwise none.
        """
        moved = iter(self._exchange(present).forward(channels))
        received = [[next(moved) if wanted[factor] else None for factor, _ in self._received] for wanted in present]
        return [
            [*self._direct_blocks(tensors, wanted), *blocks]
            for tensors, wanted, blocks in zip(channels, present, received, strict=True)
        ]

    def from_blocks(
        self,
        blocks: Sequence[Sequence[Tensor | None]],
        channels: Sequence[Channel],
        present: Sequence[Sequence[bool]],
    ) -> None:
        """Send received blocks back to the ranks they came from, and write them into the pieces.

        Args:
            blocks: as ``to_blocks`` returned them, changed in place. Direct blocks are views and need no copy.
            channels: as for ``to_blocks``; None is skipped.
            present: as for ``to_blocks``.

        Communication: one exchange if a factor that takes part moves, otherwise none.
        """
        moved = [block for of_channel in blocks for block in of_channel[len(self._direct) :] if block is not None]
        self._exchange(present).backward(moved, channels)

    def _direct_blocks(self, tensors: Channel, present: Sequence[bool]) -> list[Tensor | None]:
        if self._in_place:
            return list(tensors) if all(present) else [t if p else None for t, p in zip(tensors, present, strict=True)]
        return [
            (tensors[place.factor] if place.whole else _view(place, tensors[place.factor]))
            if present[place.factor]
            else None
            for place in self._direct
        ]

    def _exchange(self, present: Sequence[Sequence[bool]]) -> Exchange:
        """Return the exchange for a set of factors. Few sets occur (all, or one sub-group); each is planned once."""
        key = tuple(tuple(wanted) for wanted in present)
        if key not in self._exchanges:
            entries = [
                (channel, factor)
                for channel, wanted in enumerate(key)
                for factor in self._order
                if wanted[factor] and self._moving[factor]
            ]
            self._exchanges[key] = Exchange(
                entries, self._tilings, self._local_numel, self._comm, self.dtype, self._among_neighbours
            )
        return self._exchanges[key]


class _DirectBlock(NamedTuple):
    factor: int
    shape: Shape
    offset: int  # place of its first element in the local piece
    whole: bool  # whether it is the whole local piece


def _view(place: _DirectBlock, tensor: Tensor | None) -> Tensor | None:
    """Return the block as a view of the local tensor; writes to a copy would be lost."""
    return None if tensor is None else tensor.view(-1)[place.offset : place.offset + math.prod(place.shape)]
