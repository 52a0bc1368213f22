"""The elements of each expert in a rank's pieces of factors, as views."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..algebra.types import SIDE_B
from .tiling import Layout, Piece


class ExpertViews:
    """Splits local pieces of factors by expert, without communication, also where a row is cut.

    Args:
        layouts: the layout of every factor, lora_A and lora_B alternating.
        rank: the rank that holds the pieces.
        device: the device of ``owners``.

    Attributes:
        num_pairs: number of pairs; an adapter of E experts has E.
        owners: ``[views]`` int64, for each view the factor that it belongs to: 2 p for lora_A of pair p, and 2 p + 1
            for lora_B. None if every adapter is one pair, and every view one whole piece.
    """

    def __init__(self, layouts: Sequence[Layout], rank: int, device: torch.device) -> None:
        self._layouts = tuple(layouts)
        self._pieces = [layout.piece(rank) for layout in layouts]
        self.num_pairs = sum(layout.experts for layout in layouts[::2])
        self.owners: Tensor | None = None
        if any(layout.experts > 1 for layout in layouts):
            self.owners = torch.tensor(list(self._owners())).to(device)

    def of(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the views of every factor's local piece, in the order of ``owners``; None for those of None."""
        if self.owners is None:
            return list(tensors)
        return [
            view
            for factor, tensor in enumerate(tensors)
            for of_expert in self._views(factor, tensor)
            for view in of_expert
        ]

    def _owners(self) -> Iterator[int]:
        first = 0
        for factor, layout in enumerate(self._layouts):
            template = torch.empty(self._pieces[factor].numel, device="meta")
            for expert, views in enumerate(self._views(factor, template)):
                yield from [2 * (first + expert) + factor % 2] * len(views)
            first += layout.experts if factor % 2 == SIDE_B else 0

    def _views(self, factor: int, tensor: Tensor | None) -> list[list[Tensor | None]]:
        """Return the views of every expert."""
        layout, piece = self._layouts[factor], self._pieces[factor]
        if layout.experts == 1:
            return [[tensor]]
        if tensor is None:
            template = torch.empty(piece.numel, device="meta")
            return [[None] * len(views) for views in self._views(factor, template)]
        flat = tensor.view(-1)
        if factor % 2 == SIDE_B:  # the expert is the fastest index
            return [
                [flat[(expert - piece.start) % layout.experts :: layout.experts]] for expert in range(layout.experts)
            ]
        if layout.columns:
            return [[flat[start:stop]] for start, stop in _runs_of_rows(layout, piece)]
        return [list(_runs_of_columns(layout, piece, flat, expert)) for expert in range(layout.experts)]


def _runs_of_rows(layout: Layout, piece: Piece) -> list[tuple[int, int]]:
    """Return for every expert the elements of a piece of ``[E r, rows]``."""
    if layout.by_rows:
        size = piece.numel // layout.experts
        return [(expert * size, (expert + 1) * size) for expert in range(layout.experts)]
    size = layout.lora_rank * layout.rows
    bounds = [min(max(expert * size, piece.start), piece.stop) - piece.start for expert in range(layout.experts + 1)]
    return list(itertools.pairwise(bounds))


def _runs_of_columns(layout: Layout, piece: Piece, flat: Tensor, expert: int) -> Iterator[Tensor]:
    """Yield the elements of an expert in a piece of ``[rows, E r]``: those of a cut row at either end, and the rest."""
    width = layout.width
    left, right = expert * layout.lora_rank, (expert + 1) * layout.lora_rank
    first = min(-(-piece.start // width) * width, piece.stop)
    last = max(piece.stop // width * width, first)
    yield flat[first - piece.start : last - piece.start].view(-1, width)[:, left:right]
    for start, stop in ((piece.start, first), (last, piece.stop)):
        if stop > start:
            row = start // width * width
            begin, end = (min(max(row + column, start), stop) - piece.start for column in (left, right))
            yield flat[begin:end]
