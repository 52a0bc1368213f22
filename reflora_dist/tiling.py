"""Who computes on which rows of a tall factor: planning only, no communication.

Engines cut a parameter into flat row-major pieces. A piece of lora_B ``[out, r]`` is rows of the tall factor but
for a row cut at either end; a piece of lora_A ``[r, in]`` cuts every column, that is every row of ``A^T``. Every
pair has an owner, a rank to which the pieces of lora_A, and the cut rows of lora_B, are given.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .blocks import SIDE_A

Shape = tuple[int, int]
FOLLOWING = -1  # as a shard's start: right behind those of the ranks before


class LocalShard(NamedTuple):
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


class Run(NamedTuple):
    """Elements that lie together on both sides of the exchange.

    Attributes:
        peer: the other rank, possibly this one.
        start: first element, in this rank's piece (sent) or in its block (received).
        numel: how many.
    """

    peer: int
    start: int
    numel: int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One factor as one rank sees it.

    Attributes:
        exchanged: whether any rank sends any element of this factor (the same on all ranks).
        direct: ``(first element, shape)`` of the block that lies in this rank's piece, or None.
        sent: what the owner, possibly this rank, computes on after the exchange, in the piece's order.
        received: shape of the block that the exchange brings, or None.
        arriving: where that block's elements come from, in the block's order.
    """

    exchanged: bool = False
    direct: tuple[int, Shape] | None = None
    sent: tuple[Run, ...] = ()
    received: Shape | None = None
    arriving: tuple[Run, ...] = ()


def follow_each_other(shards: Sequence[Sequence[LocalShard]]) -> list[list[LocalShard]]:
    """Give pieces without a start the place behind those of the ranks before, as FSDP lays them out."""
    placed = []
    positions = [0] * len(shards[0])
    for rank_shards in shards:
        placed.append(
            [
                LocalShard(shard.numel, position, shard.tall) if shard.start == FOLLOWING else shard
                for shard, position in zip(rank_shards, positions, strict=True)
            ]
        )
        positions = [position + shard.numel for position, shard in zip(positions, rank_shards, strict=True)]
    return placed


def choose_owners(shapes: Sequence[Shape], shards: Sequence[Sequence[LocalShard]]) -> list[int]:
    """The owner of every pair: who holds more than half of lora_A, else who has least to do so far.

    Args:
        shapes: of whole factors, ``(r, in)`` and ``(out, r)`` alternating.
        shards: ``shards[rank][factor]``.
    """
    owners, elements = [], [0] * len(shards)
    for factor in range(0, len(shapes), 2):
        numel = shapes[factor][0] * shapes[factor][1]
        held = [rank_shards[factor] for rank_shards in shards]
        most = max(range(len(shards)), key=lambda rank: held[rank].numel)
        keeps = 2 * held[most].numel > numel and not held[most].tall
        owner = most if keeps else min(range(len(shards)), key=elements.__getitem__)
        owners.append(owner)
        elements[owner] += numel
    return owners


def tile(side: int, shape: Shape, shards: Sequence[LocalShard], rank: int, owner: int) -> Tiling:
    """Plan one factor.

    Args:
        side: SIDE_A or SIDE_B.
        shape: of the whole factor, ``(r, in)`` or ``(out, r)``.
        shards: what each rank holds.
        rank: whose view to return.
        owner: of the pair.

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
    tile_side = _tile_columns if side == SIDE_A else _tile_rows
    return tile_side(shape, shards, rank, owner)


def _tile_columns(shape: Shape, shards: Sequence[LocalShard], rank: int, owner: int) -> Tiling:
    """lora_A: whole on its owner, unless a rank holds it whole anyway."""
    numel = shape[0] * shape[1]
    if any(shard.numel == numel for shard in shards):
        return Tiling(direct=(0, shape) if shards[rank].numel else None)
    sent = (Run(owner, 0, shards[rank].numel),) if shards[rank].numel else ()
    if rank != owner:
        return Tiling(True, None, sent)
    arriving = [Run(holder, shards[holder].start, shards[holder].numel) for holder in _by_start(shards)]
    return Tiling(True, None, sent, shape, tuple(arriving))


def _cut(first: int, last: int, bounds: Sequence[int], holders: Sequence[int]) -> Iterator[Run]:
    """``[first, last)`` cut at ascending bounds; ``holders[i]`` holds what begins at ``bounds[i]``."""
    position = first
    while position < last:
        index = bisect.bisect_right(bounds, position) - 1
        end = min(bounds[index + 1], last) if index + 1 < len(bounds) else last
        yield Run(holders[index], position - first, end - position)
        position = end


def _tile_rows(shape: Shape, shards: Sequence[LocalShard], rank: int, owner: int) -> Tiling:
    """lora_B: whole rows stay, rows that are cut between ranks go to the owner."""
    width = shape[1]
    holders = _by_start(shards)
    starts = [shards[holder].start for holder in holders]
    cut_rows = sorted({start // width for start in starts if start % width})
    direct, sent = None, []
    mine = shards[rank]
    if mine.numel:
        first = min(-(-mine.start // width) * width, mine.stop)
        last = max(mine.stop // width * width, first)
        if last > first:
            direct = (first - mine.start, ((last - first) // width, width))
        ends = [(mine.start, first), (last, mine.stop)]
        sent = [Run(owner, start - mine.start, stop - start) for start, stop in ends if stop > start]
    if rank != owner or not cut_rows:
        return Tiling(bool(cut_rows), direct, tuple(sent))
    arriving = [
        Run(run.peer, place * width + run.start, run.numel)
        for place, row in enumerate(cut_rows)
        for run in _cut(row * width, (row + 1) * width, starts, holders)
    ]
    return Tiling(True, direct, tuple(sent), (len(cut_rows), width), tuple(arriving))


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


def head(side: int, shape: Shape, shard: LocalShard, count: int) -> list[tuple[int, int, int]]:
    """Which of a factor's first ``count`` elements, row by row, lie in a shard: (place there, place, how many).

    Args:
        shard: with its start filled in; a tall one of lora_A is whole columns.
    """
    columns = shape[1]
    if side != SIDE_A or not shard.tall:
        numel = min(shard.stop, count) - shard.start
        return [(0, shard.start, numel)] if numel > 0 else []
    width, first = shard.numel // shape[0], shard.start // shape[0]
    runs = []
    for row in range(-(-count // columns)):
        numel = min(row * columns + first + width, count) - (row * columns + first)
        if numel > 0:
            runs.append((row * width, row * columns + first, numel))
    return runs
