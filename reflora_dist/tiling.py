"""Who computes on which rows of a tall factor: planning only, no communication.

Engines cut a parameter into flat row-major pieces. A piece of lora_B ``[out, r]`` is rows of the tall factor but
for a row cut at either end; a piece of lora_A ``[r, in]`` cuts every column, that is every row of ``A^T``. Every
column, and every cut row, is given to one rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import SIDE_A

Shape = tuple[int, int]
FOLLOWING = -1  # as a shard's start: right behind those of the ranks before
_NO_RANKS = torch.empty(0, dtype=torch.int16)


@dataclasses.dataclass(frozen=True)
class LocalShard:
    """What one rank holds of one factor: ``numel`` elements.

    A flat piece begins at element ``start`` of the row-major whole factor; ``follow_each_other`` fills in FOLLOWING. A
    ``tall`` shard is whole rows of the tall factor already (columns of lora_A, rows of lora_B) and stays where
    it is.
    """

    numel: int
    start: int = 0
    tall: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One factor as one rank sees it.

    Attributes:
        exchanged: whether any rank sends any element of this factor (the same on all ranks).
        direct: ``(first element, shape)`` of the block that lies in this rank's piece, or None.
        sent: ranges of this rank's piece that other ranks, or itself, compute on after the exchange.
        targets: the rank of each element of ``sent``.
        received: shape of the block that the exchange brings, or None.
        sources: the rank that each element of the received block comes from.
    """

    exchanged: bool = False
    direct: tuple[int, Shape] | None = None
    sent: tuple[tuple[int, int], ...] = ()
    targets: Tensor = _NO_RANKS
    received: Shape | None = None
    sources: Tensor = _NO_RANKS


def follow_each_other(shards: Sequence[Sequence[LocalShard]]) -> list[list[LocalShard]]:
    """Give pieces without a start the place behind those of the ranks before, as FSDP lays them out."""
    placed = []
    positions = [0] * len(shards[0])
    for rank_shards in shards:
        placed.append(
            [
                dataclasses.replace(shard, start=position) if shard.start == FOLLOWING else shard
                for shard, position in zip(rank_shards, positions, strict=True)
            ]
        )
        positions = [position + shard.numel for position, shard in zip(positions, rank_shards, strict=True)]
    return placed


def tile(side: int, shape: Shape, shards: Sequence[LocalShard], rank: int) -> Tiling:
    """Plan one factor.

    Args:
        side: SIDE_A or SIDE_B.
        shape: of the whole factor, ``(r, in)`` or ``(out, r)``.
        shards: what each rank holds.
        rank: whose view to return.

    Raises:
        ValueError: the shards do not tile the factor exactly.
    """
    _check_tiling(shape, shards)
    mine = shards[rank]
    lora_rank = shape[side]
    if mine.tall or (not mine.numel and any(shard.tall for shard in shards)):
        rows = mine.numel // lora_rank
        local_shape = (lora_rank, rows) if side == SIDE_A else (rows, lora_rank)
        return Tiling(direct=(0, local_shape) if rows else None)
    return _tile_columns(shape, shards, rank) if side == SIDE_A else _tile_rows(shape, shards, rank)


def _tile_columns(shape: Shape, shards: Sequence[LocalShard], rank: int) -> Tiling:
    """lora_A: split its columns among the ranks in proportion to what they hold, so that most stay at home."""
    lora_rank, columns = shape
    numel = lora_rank * columns
    if any(shard.numel == numel for shard in shards):
        return Tiling(direct=(0, shape) if shards[rank].numel else None)
    holders = _by_start(shards)
    first_column = torch.tensor([columns * shards[holder].start // numel for holder in holders])
    owner_of_column = torch.searchsorted(first_column, torch.arange(columns), right=True) - 1
    holders_tensor = torch.tensor(holders, dtype=torch.int16)

    mine = shards[rank]
    if not mine.numel:
        return Tiling(exchanged=True)
    targets = holders_tensor[owner_of_column[torch.arange(mine.start, mine.stop) % columns]]
    own_columns = torch.nonzero(holders_tensor[owner_of_column] == rank).flatten()
    elements = torch.arange(lora_rank)[:, None] * columns + own_columns
    sources = _holders_of(elements.flatten(), shards)
    received = (lora_rank, own_columns.numel()) if own_columns.numel() else None
    return Tiling(True, None, ((0, mine.numel),), targets, received, sources)


def _tile_rows(shape: Shape, shards: Sequence[LocalShard], rank: int) -> Tiling:
    """lora_B: whole rows stay, a row cut between ranks goes to the rank that holds its first element."""
    width = shape[1]
    exchanged = any(shard.numel and shard.start % width for shard in shards)
    mine = shards[rank]
    if not mine.numel:
        return Tiling(exchanged=exchanged)
    whole_start = min(-(-mine.start // width) * width, mine.stop)
    whole_stop = max(mine.stop // width * width, whole_start)
    direct = None
    if whole_stop > whole_start:
        direct = (whole_start - mine.start, ((whole_stop - whole_start) // width, width))

    cut = [(mine.start, whole_start), (whole_stop, mine.stop)]
    sent = tuple((start - mine.start, stop - mine.start) for start, stop in cut if stop > start)
    elements = torch.cat([torch.arange(start, stop) for start, stop in cut])
    targets = _holders_of(elements // width * width, shards)
    if whole_stop == mine.stop:  # no row begins here and ends on another rank
        return Tiling(exchanged, direct, sent, targets)
    sources = _holders_of(torch.arange(whole_stop, whole_stop + width), shards)
    return Tiling(exchanged, direct, sent, targets, (1, width), sources)


def _holders_of(elements: Tensor, shards: Sequence[LocalShard]) -> Tensor:
    """The rank that holds each element of the whole factor."""
    holders = _by_start(shards)
    starts = torch.tensor([shards[holder].start for holder in holders])
    return torch.tensor(holders, dtype=torch.int16)[torch.searchsorted(starts, elements, right=True) - 1]


def _by_start(shards: Sequence[LocalShard]) -> list[int]:
    return sorted((rank for rank, shard in enumerate(shards) if shard.numel), key=lambda rank: shards[rank].start)


def _check_tiling(shape: Shape, shards: Sequence[LocalShard]) -> None:
    numel = shape[0] * shape[1]
    if any(shard.tall for shard in shards):
        if sum(shard.numel for shard in shards) != numel:
            raise ValueError(f"the ranks hold {[s.numel for s in shards]} elements of a factor of shape {shape}")
        return
    position = 0
    for rank in _by_start(shards):
        if shards[rank].start != position:
            break
        position = shards[rank].stop
    if position != numel:
        pieces = [(shard.start, shard.stop) for shard in shards]
        raise ValueError(f"the ranks' pieces {pieces} do not tile a factor of shape {shape} ({numel} elements)")
