"""Re-tiling: flat pieces of factors become whole rows of tall factors, with one all-to-all for all adapters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BlockSpec
from .communication import Communicator
from .exchange import Channel, Exchange
from .tiling import LocalShard, Run, Tiling, choose_owners, tile


class Retiler:
    """Moves weights and gradients between the shards of an engine and blocks that products can be formed on.

    Whole rows stay in place, as *direct* blocks, which are views. What is cut goes to the pair's owner, whose
    *received* blocks are all of lora_A, and the rows of lora_B that are cut. With them every rank may send an owner
    a *message* about the pairs of one lora_rank that it owns, and gets it back as the owner has changed it.

    Args:
        shapes: whole shape of every factor, ``(r, in)`` and ``(out, r)`` alternating.
        shards: ``shards[rank][factor]``, for every rank of the communicator's group.
        communicator: carries the exchange.
        dtype: of elements on the wire, float32 or float64, the same on all ranks.
        message_values: float64 values about one pair, of its lora_rank and ``keeps_a``; None if there are no messages.

    Attributes:
        dtype: as given.
        cut: whether anything has to be sent (the same on all ranks).
        keeps_a: whether any lora_A stays where it is (the same on all ranks).
        messages: what each message is about, in their order.
        owned: the pairs of which this rank is the owner, in the order of messages.

    Raises:
        ValueError: the ranks' shards do not tile a factor exactly.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Sequence[LocalShard]],
        communicator: Communicator,
        dtype: torch.dtype = torch.float32,
        message_values: Callable[[int, bool], int] | None = None,
    ) -> None:
        self._comm = communicator
        self.dtype = dtype
        self._num_factors = len(shapes)
        owners = choose_owners(shapes, shards)
        # Layers repeat, and under most engines so do their tilings.
        plan = functools.cache(tile)
        tilings = [
            plan(
                factor % 2, shape, tuple(of_rank[factor] for of_rank in shards), communicator.rank, owners[factor // 2]
            )
            for factor, shape in enumerate(shapes)
        ]
        self.cut = any(tiling.exchanged for tiling in tilings)
        self.keeps_a = not all(tiling.exchanged for tiling in tilings[::2])
        self._local_numel = [shard.numel for shard in shards[communicator.rank]]
        self._direct = [
            _Place(factor, tiling.direct[1], tiling.direct[0], math.prod(tiling.direct[1]) == self._local_numel[factor])
            for factor, tiling in enumerate(tilings)
            if tiling.direct is not None
        ]
        # then blocks are the tensors themselves, and a step has nothing to prepare
        self._in_place = len(self._direct) == len(shapes) and all(place.whole for place in self._direct)
        # Factors of one shape follow each other, so that what the exchange brings is one stack of blocks per shape.
        order = sorted(range(len(shapes)), key=lambda factor: shapes[factor])
        self._received = [
            (factor, tiling.received) for factor in order if (tiling := tilings[factor]).received is not None
        ]
        self.messages = list(_group(shapes, owners))
        self.owned = [pair for about in self.messages if about.owner == communicator.rank for pair in about.pairs]
        if message_values is not None:
            words = torch.float64.itemsize // dtype.itemsize
            numels = [
                len(about.pairs) * message_values(about.lora_rank, self.keeps_a) * words for about in self.messages
            ]
            self._local_numel += numels
            tilings += [self._tile_message(*of) for of in zip(numels, self.messages, strict=True)]
        self._tilings = tilings
        self._order = order
        self._owns = [about.owner == communicator.rank for about in self.messages]
        self._exchanges: dict[tuple[tuple[bool, ...], ...], Exchange] = {}

    @property
    def specs(self) -> list[BlockSpec]:
        """The blocks of this rank, in the order of ``to_blocks``: direct ones, then received ones."""
        return self.direct_specs + self.received_specs

    @property
    def direct_specs(self) -> list[BlockSpec]:
        return [_spec(place.factor, place.shape) for place in self._direct]

    @property
    def received_specs(self) -> list[BlockSpec]:
        return [_spec(factor, shape) for factor, shape in self._received]

    def direct(self, tensors: Channel, present: Sequence[bool]) -> list[Tensor | None]:
        """The direct blocks of a channel, None where a factor does not take part."""
        if self._in_place:
            tensors, present = tensors[: self._num_factors], present[: self._num_factors]
            return list(tensors) if all(present) else [t if p else None for t, p in zip(tensors, present, strict=True)]
        return [
            (tensors[place.factor] if place.whole else _view(place, tensors[place.factor]))
            if present[place.factor]
            else None
            for place in self._direct
        ]

    def to_blocks(
        self,
        channels: Sequence[Channel],
        present: Sequence[Sequence[bool]],
        communicator: Communicator | None = None,
    ) -> list[list[Tensor | None]]:
        """Bring the local pieces of one or more channels into blocks.

        Args:
            channels: per channel the local tensor of every factor, then, if there are any, every message; None counts
                as zeros.
            present: per channel which of them take part, the same on every rank.
            communicator: over the same ranks, in place of the one given at first.

        Returns:
            Per channel the blocks in the order of ``specs``, None where a factor does not take part: contiguous, of the
            specified number of elements but possibly of another number of dimensions. Then the messages about
            ``owned`` pairs, each ``[ranks, elements]``. In host memory, what an exchange brought is
            overwritten by the next one of the same factors, and by ``from_blocks``.

        Communication: one all-to-all if something that takes part is cut, otherwise none.
        """
        moved = iter(self._exchange(present).forward(channels, communicator or self._comm))
        messages = [
            [next(moved) for place, sent in enumerate(wanted[self._num_factors :]) if sent and self._owns[place]]
            for wanted in present
        ]
        received = [
            [next(moved) if wanted[factor] else None for factor, _ in self._received] for wanted in reversed(present)
        ]
        return [
            [*self.direct(tensors, wanted), *of_factors, *of_messages]
            for tensors, wanted, of_factors, of_messages in zip(
                channels, present, reversed(received), messages, strict=True
            )
        ]

    def from_blocks(
        self,
        blocks: Sequence[Sequence[Tensor | None]],
        channels: Sequence[Channel],
        present: Sequence[Sequence[bool]],
        communicator: Communicator | None = None,
    ) -> None:
        """Write received blocks and messages, as ``to_blocks`` returned them and changed in place, back to their ranks.

        Communication: one all-to-all if something that takes part is cut, otherwise none.
        """
        first = len(self._direct)
        middle = first + len(self._received)
        moved = [block for of_channel in blocks for block in of_channel[middle:]]
        moved += [block for of_channel in reversed(blocks) for block in of_channel[first:middle]]
        exchange = self._exchange(present)
        exchange.backward([block for block in moved if block is not None], channels, communicator or self._comm)

    def _exchange(self, present: Sequence[Sequence[bool]]) -> Exchange:
        """Few sets of factors meet in an exchange (all, or those of one sub-group), and each is planned once."""
        key = tuple(tuple(wanted) for wanted in present)
        if key not in self._exchanges:
            # What is sent back lies together: messages and, behind them, the last channel. Messages come first of all,
            # since what is not float32 in them has to be aligned.
            entries = [
                (channel, item)
                for channel, wanted in enumerate(key)
                for item in range(self._num_factors, len(wanted))
                if wanted[item]
            ]
            entries += [
                (channel, factor)
                for channel, wanted in reversed(list(enumerate(key)))
                for factor in self._order
                if wanted[factor] and self._tilings[factor].exchanged
            ]
            self._exchanges[key] = Exchange(entries, self._tilings, self._local_numel, self._comm, self.dtype)
        return self._exchanges[key]

    def _tile_message(self, numel: int, about: About) -> Tiling:
        ranks = range(self._comm.world_size)
        if about.owner != self._comm.rank:
            return Tiling(True, None, (Run(about.owner, 0, numel),))
        arriving = tuple(Run(rank, rank * numel, numel) for rank in ranks)
        return Tiling(True, None, (Run(about.owner, 0, numel),), (len(ranks), numel), arriving)


class About(NamedTuple):
    """Pairs of one lora_rank and owner."""

    lora_rank: int
    owner: int
    pairs: tuple[int, ...]


def _group(shapes: Sequence[tuple[int, int]], owners: Sequence[int]) -> Iterator[About]:
    groups: dict[tuple[int, int], list[int]] = {}
    for pair, owner in enumerate(owners):
        groups.setdefault((shapes[2 * pair][0], owner), []).append(pair)
    for (lora_rank, owner), pairs in sorted(groups.items()):
        yield About(lora_rank, owner, tuple(pairs))


class _Place(NamedTuple):
    factor: int
    shape: tuple[int, int]
    offset: int  # of its first element in the local piece
    whole: bool  # it is all of the local piece


def _spec(factor: int, shape: tuple[int, int]) -> BlockSpec:
    return BlockSpec(factor // 2, factor % 2, shape, columns=factor % 2 == 0)


def _view(place: _Place, tensor: Tensor | None) -> Tensor | None:
    """Never a copy, which would be changed in vain."""
    return None if tensor is None else tensor.view(-1)[place.offset : place.offset + math.prod(place.shape)]
