"""Re-tiling: flat pieces of factors become whole rows of tall factors, with one all-to-all for all adapters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    *received* blocks are all of lora_A, and the rows of lora_B that are cut. With them every rank may send the owner
    a *message* of fixed size about the pair, and gets it back as the owner has changed it.

    Args:
        shapes: whole shape of every factor, ``(r, in)`` and ``(out, r)`` alternating.
        shards: ``shards[rank][factor]``, for every rank of the communicator's group.
        communicator: carries the exchange.
        dtype: of elements on the wire, float32 or float64, the same on all ranks.
        message_values: float64 values of every pair's message; none if there are no messages.

    Attributes:
        dtype: as given.
        cut: whether anything has to be sent (the same on all ranks).
        owned: the pairs of which this rank is the owner: those with messages of one size one behind the other.

    Raises:
        ValueError: the ranks' shards do not tile a factor exactly.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        shards: Sequence[Sequence[LocalShard]],
        communicator: Communicator,
        dtype: torch.dtype = torch.float32,
        message_values: Sequence[int] = (),
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
        self._local_numel = [shard.numel for shard in shards[communicator.rank]]
        self._direct = [
            _Place(factor, tiling.direct[1], tiling.direct[0])
            for factor, tiling in enumerate(tilings)
            if tiling.direct is not None
        ]
        # then blocks are the tensors themselves, and a step has nothing to prepare
        self._in_place = not self.cut and [(place.factor, place.offset, place.numel) for place in self._direct] == [
            (factor, 0, numel) for factor, numel in enumerate(self._local_numel)
        ]
        # Factors of one shape follow each other, so that what the exchange brings is one stack of blocks per shape.
        order = sorted(range(len(shapes)), key=lambda factor: shapes[factor])
        self._received = [
            (factor, tiling.received) for factor in order if (tiling := tilings[factor]).received is not None
        ]
        message_numel = [values * torch.float64.itemsize // dtype.itemsize for values in message_values]
        pairs = sorted(range(len(message_numel)), key=message_numel.__getitem__)
        self.owned = [pair for pair in pairs if owners[pair] == communicator.rank]
        # messages come first, since what is not float32 in them has to be aligned
        self._order = [*(self._num_factors + pair for pair in pairs), *order]
        self._tilings = tilings + [self._tile_message(numel, owners[pair]) for pair, numel in enumerate(message_numel)]
        self._local_numel += message_numel
        self._exchanges: dict[tuple[tuple[bool, ...], ...], Exchange] = {}

    @property
    def specs(self) -> list[BlockSpec]:
        """The blocks of this rank, in the order of ``to_blocks``: direct ones, then received ones."""
        return self.direct_specs + self.received_specs

    @property
    def direct_specs(self) -> list[BlockSpec]:
        return [BlockSpec(place.factor // 2, place.factor % 2, place.shape) for place in self._direct]

    @property
    def received_specs(self) -> list[BlockSpec]:
        return [BlockSpec(factor // 2, factor % 2, shape) for factor, shape in self._received]

    def direct(self, tensors: Channel, present: Sequence[bool]) -> list[Tensor | None]:
        """The direct blocks of a channel, None where a factor does not take part."""
        if self._in_place:
            return list(tensors) if all(present) else [t if p else None for t, p in zip(tensors, present, strict=True)]
        return [_view(place, tensors[place.factor]) if present[place.factor] else None for place in self._direct]

    def to_blocks(
        self,
        channels: Sequence[Channel],
        present: Sequence[Sequence[bool]],
        communicator: Communicator | None = None,
    ) -> list[list[Tensor | None]]:
        """Bring the local pieces of one or more channels into blocks.

        Args:
            channels: per channel the local tensor of every factor, then, if there are any, of every pair's message;
                None counts as zeros.
            present: per channel which of them take part, the same on every rank.
            communicator: over the same ranks, in place of the one given at first.

        Returns:
            Per channel the blocks in the order of ``specs``, None where a factor does not take part: contiguous, of the
            specified number of elements but possibly of another number of dimensions. Then the messages about the
            pairs in ``owned``, each ``[ranks, elements]``. In host memory, what an exchange brought is
            overwritten by the next one of the same factors.

        Communication: one all-to-all if something that takes part is cut, otherwise none.
        """
        received = iter(self._exchange(present).forward(channels, communicator or self._comm))
        blocks: list[list[Tensor | None]] = []
        for tensors, wanted in zip(channels, present, strict=True):
            messages = [next(received) for pair in self.owned if self._sends_message(wanted, pair)]
            moved = [next(received) if wanted[factor] else None for factor, _ in self._received]
            blocks.append([*self.direct(tensors, wanted), *moved, *messages])
        return blocks

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
        moved = [block for of_channel in blocks for block in (*of_channel[middle:], *of_channel[first:middle])]
        self._exchange(present).backward(
            [block for block in moved if block is not None], channels, communicator or self._comm
        )

    def _sends_message(self, wanted: Sequence[bool], pair: int) -> bool:
        return len(wanted) > self._num_factors and wanted[self._num_factors + pair]

    def _exchange(self, present: Sequence[Sequence[bool]]) -> Exchange:
        """Few sets of factors meet in an exchange (all, or those of one sub-group), and each is planned once."""
        key = tuple(tuple(wanted) for wanted in present)
        if key not in self._exchanges:
            entries = [
                (channel, item)
                for channel, wanted in enumerate(key)
                for item in self._order
                if item < len(wanted) and wanted[item] and self._tilings[item].exchanged
            ]
            self._exchanges[key] = Exchange(entries, self._tilings, self._local_numel, self._comm, self.dtype)
        return self._exchanges[key]

    def _tile_message(self, numel: int, owner: int) -> Tiling:
        ranks = range(self._comm.world_size)
        if owner != self._comm.rank:
            return Tiling(True, None, (Run(owner, 0, numel),))
        arriving = tuple(Run(rank, rank * numel, numel) for rank in ranks)
        return Tiling(True, None, (Run(owner, 0, numel),), (len(ranks), numel), arriving)


class _Place(NamedTuple):
    factor: int
    shape: tuple[int, int]
    offset: int  # of its first element in the local piece

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def _view(place: _Place, tensor: Tensor | None) -> Tensor | None:
    """Never a copy, which would be changed in vain."""
    if tensor is None or tensor.numel() == place.numel:
        return tensor
    return tensor.view(-1)[place.offset : place.offset + place.numel]
