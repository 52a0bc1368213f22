"""Which rows of a tall factor each rank computes on: planning only, no communication.

Every engine cuts a stored factor into flat row-major pieces. A piece of one that is stored tall, ``[rows, r]``, is
whole rows but for a row cut at either end: the rank that holds most of a cut row gets the rest of it. A piece of one
that is stored as PEFT's lora_A, ``[r, rows]``, cuts every row of the tall factor: all of it goes to one rank, its
owner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

Shape = tuple[int, int]


class Piece(NamedTuple):
    """Elements ``[start, start + numel)`` of a stored factor."""

    start: int
    numel: int

    @property
    def stop(self) -> int:
        return self.start + self.numel


class Layout(NamedTuple):
    """How a factor is stored, and how ranks cut it.

    Rank k holds elements ``[k * chunk - offset, (k + 1) * chunk - offset)``, as far as there are such: of the stored
    tensor, row by row, or with ``by_rows`` of the tall factor.

    Attributes:
        rows: of the tall factor, in or out.
        lora_rank: r.
        columns: whether it is stored ``[r, rows]``.
        chunk: elements.
        offset: of the factor's first element in what is cut, a flat buffer that begins with other parameters.
        by_rows: pieces are whole rows of the tall factor, however they are stored.
    """

    rows: int
    lora_rank: int
    columns: bool
    chunk: int
    offset: int = 0
    by_rows: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.lora_rank

    @property
    def shape(self) -> Shape:
        """As it is stored."""
        return (self.lora_rank, self.rows) if self.columns else (self.rows, self.lora_rank)

    def piece(self, rank: int) -> Piece:
        """What a rank holds."""
        start = min(max(rank * self.chunk - self.offset, 0), self.numel)
        stop = min(max((rank + 1) * self.chunk - self.offset, start), self.numel)
        return Piece(start, stop - start)

    def holder(self, element: int) -> int:
        """The rank that holds an element."""
        return (element + self.offset) // self.chunk

    def overlaps(self, start: int, stop: int) -> Iterator[Run]:
        """What each rank holds of elements ``[start, stop)``: its number, the first one's place in these, how many."""
        for rank in range(self.holder(start), self.holder(stop - 1) + 1):
            piece = self.piece(rank)
            first, last = max(piece.start, start), min(piece.stop, stop)
            yield Run(rank, first - start, last - first)

    @property
    def moves(self) -> bool:
        """Whether any rank has to send any of it before rows are whole."""
        if self.by_rows:
            return False
        bounds = self._inner_bounds()
        if self.columns:
            return bool(bounds)
        return any(bound % self.lora_rank for bound in bounds)

    def _inner_bounds(self) -> list[int]:
        """The first places inside of the factor at which it is cut: of equal chunks the first two tell all."""
        first = (self.offset // self.chunk + 1) * self.chunk - self.offset
        return [bound for bound in (first, first + self.chunk) if bound < self.numel]

    def owner(self, pair: int, world_size: int) -> int:
        """Who gets all of it, if it is stored as columns: who holds more than half, else ranks take turns."""
        middle = self.holder(self.numel // 2)
        return middle if 2 * self.piece(middle).numel > self.numel else pair % world_size


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
        direct: ``(first element, shape)`` of the block that lies in this rank's piece, or None.
        sent: what other ranks, or this one, compute on after the exchange, in the piece's order.
        received: shape of the block that the exchange brings, or None.
        arriving: where that block's elements come from, in the block's order.
    """

    direct: tuple[int, Shape] | None = None
    sent: tuple[Run, ...] = ()
    received: Shape | None = None
    arriving: tuple[Run, ...] = ()


def tile(layout: Layout, rank: int, owner: int) -> Tiling:
    """Plan one factor.

    Args:
        rank: whose view to return.
        owner: of a factor that is stored as columns.
    """
    piece = layout.piece(rank)
    if layout.columns and not layout.by_rows:
        return _tile_columns(layout, piece, rank, owner)
    if layout.columns:
        rows = piece.numel // layout.lora_rank
        return Tiling(direct=(0, (layout.lora_rank, rows)) if rows else None)
    return _tile_rows(layout, piece, rank)


def _tile_columns(layout: Layout, piece: Piece, rank: int, owner: int) -> Tiling:
    if not layout.moves:
        return Tiling(direct=(0, layout.shape) if piece.numel else None)
    sent = (Run(owner, 0, piece.numel),) if piece.numel else ()
    if rank != owner:
        return Tiling(sent=sent)
    return Tiling(None, sent, layout.shape, tuple(layout.overlaps(0, layout.numel)))


def _tile_rows(layout: Layout, piece: Piece, rank: int) -> Tiling:
    if not piece.numel:
        return Tiling()
    width = layout.lora_rank
    first = min(-(-piece.start // width) * width, piece.stop)
    last = max(piece.stop // width * width, first)
    direct = (first - piece.start, ((last - first) // width, width)) if last > first else None
    sent: list[Run] = []
    arriving: list[Run] = []
    for start, stop in ((piece.start, first), (last, piece.stop)):
        if stop > start:
            row = start // width * width
            parts = list(layout.overlaps(row, row + width))
            keeper = max(parts, key=lambda part: part.numel).peer  # of equal ones the first
            sent.append(Run(keeper, start - piece.start, stop - start))
            if keeper == rank:
                offset = sum(run.numel for run in arriving)
                arriving += [Run(part.peer, offset + part.start, part.numel) for part in parts]
    received = (sum(run.numel for run in arriving) // width, width) if arriving else None
    return Tiling(direct, tuple(sent), received, tuple(arriving))


def head(layout: Layout, rank: int, count: int) -> list[tuple[int, int, int]]:
    """Which of a factor's first ``count`` elements, as it is stored, a rank holds: (place there, place, how many)."""
    piece = layout.piece(rank)
    if not (layout.columns and layout.by_rows):
        numel = min(piece.stop, count) - piece.start
        return [(0, piece.start, numel)] if numel > 0 and piece.numel else []
    width, first = piece.numel // layout.lora_rank, piece.start // layout.lora_rank
    runs = []
    for row in range(-(-count // layout.rows)):
        numel = min(row * layout.rows + first + width, count) - (row * layout.rows + first)
        if numel > 0 and width:
            runs.append((row * width, row * layout.rows + first, numel))
    return runs
