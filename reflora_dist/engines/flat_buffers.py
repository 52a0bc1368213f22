"""The base of engines whose optimizer updates flat buffers: DeepSpeed ZeRO, and FSDP1 without original parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives.tiling import Layout
from .base import Engine
from .pairs import AdapterPair


class Piece(NamedTuple):
    """The part of a parameter that lies in one of the rank's flat buffers.

    Attributes:
        buffer: number of the buffer.
        offset: position of the part's first element in the buffer.
        start: position of the same element in the row-major parameter.
        numel: number of elements; may be 0.
        chunk, before: the cut between all ranks, as ``chunk`` and ``offset`` of a Layout.
    """

    buffer: int
    offset: int
    start: int
    numel: int
    chunk: int
    before: int = 0


def piece_of_buffer(buffer: int, rank: int, size: int, position: int, numel: int) -> Piece:
    """Return the part that ``rank`` holds of a parameter in a buffer that all ranks share.

    Args:
        buffer: number of the buffer.
        rank: rank in the group that shares the buffer.
        size: elements of the buffer that each rank holds.
        position: position of the parameter's first element in the whole buffer.
        numel: elements of the whole parameter.
    """
    first = max(position, rank * size)
    last = max(first, min(position + numel, (rank + 1) * size))
    offset = first - rank * size if last > first else 0
    return Piece(buffer, offset, min(first - position, numel), last - first, size, position)


class BufferEngine(Engine):
    """An engine whose factors are slices of 1-D buffers. Each buffer is one parameter of the optimizer."""

    def __init__(
        self,
        pairs: Sequence[AdapterPair],
        optimizer: torch.optim.Optimizer,
        name: str,
        group: dist.ProcessGroup,
        buffers: Sequence[Tensor],
        pieces: Sequence[Piece],
    ) -> None:
        super().__init__(pairs, optimizer)
        self.name = name
        self.group = group
        self._buffers = buffers
        self._pieces = pieces
        self.layout = "flat" if any(layout.columns for layout in self.layouts()) else "tall"
        self._check_pieces()

    def layouts(self) -> list[Layout]:
        return [
            self.pairs[factor // 2].whole(factor % 2)._replace(chunk=piece.chunk, offset=piece.before)
            for factor, piece in enumerate(self._pieces)
        ]

    def weights(self) -> list[Tensor]:
        return [_slice(self._buffers[piece.buffer].detach(), piece) for piece in self._pieces]

    def gradients(self) -> list[Tensor | None]:
        grads = [buffer.grad for buffer in self._buffers]
        return [
            None if (grad := grads[piece.buffer]) is None else _slice(grad.view(-1), piece) for piece in self._pieces
        ]

    def moments(self) -> list[dict[str, Tensor]]:
        states = [self.optimizer.state.get(buffer, {}) for buffer in self._buffers]
        return [
            {
                key: _slice(value, piece)
                for key, value in states[piece.buffer].items()
                if isinstance(value, Tensor) and value.numel() == self._buffers[piece.buffer].numel() and value.dim()
            }
            for piece in self._pieces
        ]

    def holders(self) -> list[tuple[Tensor, int]]:
        return [(self._buffers[piece.buffer], piece.offset) for piece in self._pieces]


def _slice(buffer: Tensor, piece: Piece) -> Tensor:
    return buffer[piece.offset : piece.offset + piece.numel]
