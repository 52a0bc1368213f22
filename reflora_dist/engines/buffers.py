"""Engines whose optimizer updates flat buffers: DeepSpeed ZeRO, and FSDP1 without original parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..adapters import AdapterPair
from ..tiling import LocalShard
from .base import Engine


class Piece(NamedTuple):
    """The part of a factor in one of the rank's flat buffers; ``numel`` may be 0."""

    buffer: int
    offset: int  # of its first element in the buffer
    start: int  # of the same element in the row-major factor
    numel: int


class BufferEngine(Engine):
    """Factors are slices of 1-D buffers, each of which is one parameter of the optimizer."""

    layout = "flat"

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

    def shards(self) -> list[LocalShard]:
        return [LocalShard(piece.numel, piece.start) for piece in self._pieces]

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
