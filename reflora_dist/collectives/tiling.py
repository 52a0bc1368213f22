"""Plans which rows of a tall factor each rank computes on, without communication.

Every engine cuts a stored factor into flat row-major pieces. If the factor is stored tall, ``[rows, r]``, a piece has
whole rows, except for a row that is cut at either end. The rank that holds most of a cut row gets the rest of it. If
the factor is stored as PEFT stores lora_A, ``[r, rows]``, pieces cut every row of the tall factor, and the whole factor
goes to one rank, its owner.
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
        """One past the last element."""
        return self.start + self.numel


class Layout(NamedTuple):
    """How a factor is stored, and how ranks cut it.

    Rank k holds elements ``[k * chunk - offset, (k + 1) * chunk - offset)``, clipped to the factor. Elements count in
    row-major order of the stored tensor, or with ``by_rows`` of the tall factor.

    Attributes:
        rows: number of rows of the tall factor, in or out.
        lora_rank: r.
        columns: whether the factor is stored ``[r, rows]``; otherwise ``[rows, r]``.
        chunk: number of elements per rank.
        offset: place of the factor's first element in the flat buffer that is cut; other parameters may precede it.
        by_rows: whether pieces are whole rows of the tall factor, in either storage.
        experts: E, the number of r columns wide factors that are stored side by side, as one.
    """

    rows: int
    lora_rank: int
    columns: bool
    chunk: int
    offset: int = 0
    by_rows: bool = False
    experts: int = 1

    @property
    def width(self) -> int:
        """Number of columns of the tall factor, E r."""
        return self.lora_rank * self.experts

    @property
    def numel(self) -> int:
        """Number of elements of the factor."""
        return self.rows * self.width

    @property
    def shape(self) -> Shape:
        """Shape of the stored factor."""
        return (self.width, self.rows) if self.columns else (self.rows, self.width)

    def piece(self, rank: int) -> Piece:
        """Return the elements that a rank holds."""
        start = min(max(rank * self.chunk - self.offset, 0), self.numel)
        stop = min(max((rank + 1) * self.chunk - self.offset, start), self.numel)
        return Piece(start, stop - start)

    def holder(self, element: int) -> int:
        """Return the rank that holds an element."""
        return (element + self.offset) // self.chunk

    def overlaps(self, start: int, stop: int) -> Iterator[Run]:
        """Yield for each rank its part of elements ``[start, stop)``; ``Run.start`` counts from ``start``."""
        for rank in range(self.holder(start), self.holder(stop - 1) + 1):
            piece = self.piece(rank)
            first, last = max(piece.start, start), min(piece.stop, stop)
            yield Run(rank, first - start, last - first)

    @property
    def moves(self) -> bool:
        """Whether any rank has to send elements of the factor before its rows are whole."""
        if self.by_rows:
            return False
        bounds = self._inner_bounds()
        if self.columns:
            return bool(bounds)
        return any(bound % self.width for bound in bounds)

    def _inner_bounds(self) -> list[int]:
        """Return the first two places inside the factor at which it is cut; chunks are equal, so two suffice."""
        first = (self.offset // self.chunk + 1) * self.chunk - self.offset
        return [bound for bound in (first, first + self.chunk) if bound < self.numel]

    def owner(self, pair: int, world_size: int) -> int:
        """Return the rank that receives the whole factor if it is stored as columns.

        It is the rank that holds more than half of the factor. If there is none, ranks take turns by pair.
        """
        middle = self.holder(self.numel // 2)
        return middle if 2 * self.piece(middle).numel > self.numel else pair % world_size


class Run(NamedTuple):
    """Elements that are contiguous on both sides of the exchange.

    Attributes:
        peer: the other rank, possibly this one.
        start: place of the first element in this rank's piece (sent) or block (received).
        numel: number of elements.
    """

    peer: int
    start: int
    numel: int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The plan of one rank for one factor.

    Attributes:
        direct: ``(first element, shape)`` of the direct block in this rank's piece, or None.
        sent: runs of the piece that take part in the exchange, in the piece's order; the peer may be this rank.
        received: shape of the received block, or None.
        arriving: runs of the received block, in the block's order.
    """

    direct: tuple[int, Shape] | None = None
    sent: tuple[Run, ...] = ()
    received: Shape | None = None
    arriving: tuple[Run, ...] = ()


def tile(layout: Layout, rank: int, owner: int) -> Tiling:
    """Return the plan of one rank for one factor.

    Args:
        layout: the factor's layout.
        rank: the rank that the plan is for.
        owner: the rank that receives the factor if it is stored as columns; not used otherwise.
    """
    piece = layout.piece(rank)
    if layout.columns and not layout.by_rows:
        return _tile_columns(layout, piece, rank, owner)
    if layout.columns:
        rows = piece.numel // layout.width
        return Tiling(direct=(0, (layout.width, rows)) if rows else None)
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
    width = layout.width
    first = min(-(-piece.start // width) * width, piece.stop)
    last = max(piece.stop // width * width, first)
    direct = (first - piece.start, ((last - first) // width, width)) if last > first else None
    sent: list[Run] = []
    arriving: list[Run] = []
    for start, stop in ((piece.start, first), (last, piece.stop)):
        if stop > start:
            row = start // width * width
            parts = list(layout.overlaps(row, row + width))
            keeper = max(parts, key=lambda part: part.numel).peer  # the first rank, if parts are equal
            sent.append(Run(keeper, start - piece.start, stop - start))
            if keeper == rank:
                offset = sum(run.numel for run in arriving)
                arriving += [Run(part.peer, offset + part.start, part.numel) for part in parts]
    received = (sum(run.numel for run in arriving) // width, width) if arriving else None
    return Tiling(direct, tuple(sent), received, tuple(arriving))


def head(layout: Layout, rank: int, count: int) -> list[tuple[int, int, int]]:
    """Return the parts of a stored factor's first ``count`` elements that a rank holds.

    Returns:
        For each part (place in the rank's piece, place in the stored factor, number of elements).
    """
    piece = layout.piece(rank)
    if not (layout.columns and layout.by_rows):
        numel = min(piece.stop, count) - piece.start
        return [(0, piece.start, numel)] if numel > 0 and piece.numel else []
    width, first = piece.numel // layout.width, piece.start // layout.width
    runs = []
    for row in range(-(-count // layout.rows)):
        numel = min(row * layout.rows + first + width, count) - (row * layout.rows + first)
        if numel > 0 and width:
            runs.append((row * width, row * layout.rows + first, numel))
    return runs
