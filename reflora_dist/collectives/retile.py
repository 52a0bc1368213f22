"""Local pieces of factors become blocks of whole rows of tall factors, with at most one exchange for all adapters."""

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
    """Moves weights and gradients between the pieces of an engine and blocks that products can be formed on.

    Whole rows stay in place, as *direct* blocks, which are views. Rows that are cut go to the neighbour that holds most
    of them, and factors that are stored as columns to their owner, as *received* blocks.

    Args:
        layouts: of every factor, lora_A and lora_B alternating.
        communicator: carries the exchange.
        dtype: of elements on the wire, float32 or float64, the same on all ranks.

    Attributes:
        dtype: as given.
        moves: whether any rank has to send anything (the same on all ranks).
        specs: the blocks of this rank, in the order of ``to_blocks``: direct ones, then received ones.

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
        plan = functools.cache(tile)  # layers repeat
        owners = [layout.owner(factor // 2, communicator.world_size) for factor, layout in enumerate(layouts)]
        self._tilings = [
            plan(layout, communicator.rank, owner if layout.columns else 0)
            for layout, owner in zip(layouts, owners, strict=True)
        ]
        self._moving = [layout.moves for layout in layouts]
        self.moves = any(self._moving)
        # rows have two neighbours, columns may come from anywhere
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
        # then blocks are the tensors themselves, and a step has nothing to prepare
        self._in_place = len(self._direct) == len(layouts) and all(place.whole for place in self._direct)
        # Factors of one shape follow each other, so that what the exchange brings is one stack of blocks per shape.
        self._order = sorted(range(len(layouts)), key=lambda factor: (layouts[factor].columns, layouts[factor].shape))
        self._received = [
            (factor, shape) for factor in self._order if (shape := self._tilings[factor].received) is not None
        ]
        placed = [(place.factor, place.shape) for place in self._direct] + self._received
        self.specs = [BlockSpec(factor // 2, factor % 2, shape, layouts[factor].columns) for factor, shape in placed]
        self._exchanges: dict[tuple[tuple[bool, ...], ...], Exchange] = {}

    def to_blocks(self, channels: Sequence[Channel], present: Sequence[Sequence[bool]]) -> list[list[Tensor | None]]:
        """Bring the local pieces of one or more channels into blocks.

        Args:
            channels: per channel the local tensor of every factor; None counts as zeros.
            present: per channel which of them take part, the same on every rank.

        Returns:
            Per channel the blocks in the order of ``specs``, None where a factor does not take part: contiguous, of the
            specified number of elements but possibly of another number of dimensions.

        Communication: an exchange if something that takes part moves, otherwise none.
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
        """Write received blocks, as ``to_blocks`` returned them and changed in place, back to their ranks.

        Communication: an exchange if something that takes part moves, otherwise none.
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
        """Few sets of factors meet in an exchange (all, or those of one sub-group), and each is planned once."""
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
    offset: int  # of its first element in the local piece
    whole: bool  # it is all of the local piece


def _view(place: _DirectBlock, tensor: Tensor | None) -> Tensor | None:
    """Never a copy, which would be changed in vain."""
    return None if tensor is None else tensor.view(-1)[place.offset : place.offset + math.prod(place.shape)]
