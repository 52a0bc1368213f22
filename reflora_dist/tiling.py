"""Who computes on which rows of a tall factor: planning only, no communication.

Engines cut a parameter into flat row-major pieces. A piece of lora_B ``[out, r]`` is rows of the tall factor but
for a row cut at either end; a piece of lora_A ``[r, in]`` cuts every column, that is every row of ``A^T``. Every
column, and every cut row, is given to one rank.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .blocks import SIDE_A

Shape = tuple[int, int]
FOLLOWING = -1  # as a shard's start: right behind those of the ranks before
# Columns are dealt out in multiples of this where pieces allow it: what moves together is copied together.
_GRANULE = 16


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
        sent: what other ranks, or itself, compute on after the exchange, in the piece's order.
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
    mine = shards[rank]
    if not mine.numel:
        return Tiling(exchanged=True)
    holders = _by_start(shards)
    bounds = _column_bounds(columns, numel, [shards[holder].start for holder in holders])
    sent = _runs(mine.start, mine.stop, columns, bounds, holders)
    place = holders.index(rank)
    first, last = bounds[place], bounds[place + 1]
    if first == last:
        return Tiling(True, None, tuple(sent))
    starts = [shards[holder].start for holder in holders]
    arriving = [
        Run(run.peer, row * (last - first) + run.start, run.numel)
        for row in range(lora_rank)
        for run in _cut(row * columns + first, row * columns + last, starts, holders)
    ]
    return Tiling(True, None, tuple(sent), (lora_rank, last - first), tuple(arriving))


def _column_bounds(columns: int, numel: int, starts: Sequence[int]) -> list[int]:
    """The first column of every holder, in the order of their pieces, and the number of columns at the end."""
    granule = math.gcd(_GRANULE, columns, *starts)
    if columns < 4 * granule * len(starts):  # shares as even as possible matter more
        granule = 1
    return [columns * start // numel // granule * granule for start in starts] + [columns]


def _runs(start: int, stop: int, columns: int, bounds: list[int], holders: Sequence[int]) -> Iterator[Run]:
    """A piece of lora_A, cut where a row ends and where another rank's columns begin."""
    position = start
    while position < stop:
        row_start = position // columns * columns
        row_stop = min(row_start + columns, stop)
        for run in _cut(position - row_start, row_stop - row_start, bounds[:-1], holders):
            yield Run(run.peer, position - start + run.start, run.numel)
        position = row_stop


def _cut(first: int, last: int, bounds: Sequence[int], holders: Sequence[int]) -> Iterator[Run]:
    """``[first, last)`` cut at ascending bounds; ``holders[i]`` holds what begins at ``bounds[i]``."""
    position = first
    while position < last:
        index = bisect.bisect_right(bounds, position) - 1
        end = min(bounds[index + 1], last) if index + 1 < len(bounds) else last
        yield Run(holders[index], position - first, end - position)
        position = end


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

    holders = _by_start(shards)
    starts = [shards[holder].start for holder in holders]
    sent = []
    for start, stop in ((mine.start, whole_start), (whole_stop, mine.stop)):
        if stop > start:  # these elements belong to one row
            (owner,) = _cut(start // width * width, start // width * width + 1, starts, holders)
            sent.append(Run(owner.peer, start - mine.start, stop - start))
    if whole_stop == mine.stop:  # no row begins here and ends on another rank
        return Tiling(exchanged, direct, tuple(sent))
    return Tiling(
        exchanged, direct, tuple(sent), (1, width), tuple(_cut(whole_stop, whole_stop + width, starts, holders))
    )


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
