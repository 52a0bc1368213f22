"""The change of a frozen weight, ``W - scaling * B A``, on any rectangle of it. Nothing here knows about ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements whose fp64 product is held at a time: few enough for a core's cache, enough to fill a GPU.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**16, 2**24
# Periods of a checksum's position weights. They are primes, so that swapped rows or columns change the checksum.
_ROW_PERIOD, _COLUMN_PERIOD = 8191, 8179
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Block(NamedTuple):
    """A rectangle of a weight ``[rows, columns]``.

    Attributes:
        tensor: a view of the memory that holds the rectangle.
        row, column: its first row and column in the weight.
    """

    tensor: Tensor
    row: int
    column: int


def blocks_of_flat_piece(piece: Tensor, start: int, columns: int) -> list[Block]:
    """Return elements ``[start, start + len(piece))`` of a row-major weight as at most three rectangles.

    The first and the last row may be cut; the rows between them are whole.
    """
    blocks: list[Block] = []
    position, end = start, start + piece.numel()
    while position < end:
        row, column = divmod(position, columns)
        cut = column > 0 or end - position < columns
        count = min(columns - column, end - position) if cut else (end - position) // columns * columns
        view = piece[position - start : position - start + count].view(-1, count if cut else columns)
        blocks.append(Block(view, row, column))
        position += count
    return blocks


@torch.no_grad()
def subtract_product(block: Block, left: Tensor, right: Tensor, scaling: float) -> None:
    """Compute ``weight -= scaling * left @ right`` on one block, in place and reproducibly to the bit.

    A product of two fp32 numbers is exact in fp64, and the sum over r is taken in order, one addition at a time. So
    the result is the same to the bit for every sharding, number of ranks and device; a matrix product does not promise
    that. Seven ranks, or one, can repeat a change that two ranks made.

    Shapes (R x C the weight, r = lora_rank):
        block.tensor  [n, m]  fp64, fp32, bf16 or fp16; rounded once
        left          [R, r]  at most fp32 precision
        right         [r, C]  at most fp32 precision
    """
    columns = slice(block.column, block.column + block.tensor.shape[1])
    device = compute_device(block.tensor.device)
    right64 = right[:, columns].to(device, torch.float64)
    left64 = left[block.row : block.row + block.tensor.shape[0]].to(device, torch.float64)
    for rows in _row_ranges(block.tensor, device):
        product = torch.zeros(rows.stop - rows.start, right64.shape[1], dtype=torch.float64, device=device)
        for k in range(right64.shape[0]):
            product.addcmul_(left64[rows, k : k + 1], right64[k : k + 1])
        weight = block.tensor[rows].to(device, torch.float64)
        block.tensor[rows] = (weight - product * scaling).to(block.tensor.dtype)


@torch.no_grad()
def checksum(block: Block) -> int:
    """Return a sum over the bit patterns of a block's elements, weighted by their positions in the weight.

    The checksums of the blocks of a weight add up, modulo 2**64, to the weight's checksum, however it is cut.
    """
    device = compute_device(block.tensor.device)
    row_count, column_count = block.tensor.shape
    column_weights = torch.arange(block.column, block.column + column_count, device=device) % _COLUMN_PERIOD + 1
    # odd, so that an element and its transposed position have different weights
    row_weights = torch.arange(block.row, block.row + row_count, device=device) % _ROW_PERIOD * 2 + 1
    total = 0
    for rows in _row_ranges(block.tensor, device):
        values = block.tensor[rows].contiguous()
        bits = values.view(_BITS[values.element_size()]).to(device, torch.int64)
        total += int(((bits * column_weights).sum(dim=1) * row_weights[rows]).sum())
    return total % 2**64


def _row_ranges(tensor: Tensor, device: torch.device) -> Iterator[slice]:
    limit = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, limit // max(1, tensor.shape[1]))
    for first in range(0, tensor.shape[0], step):
        yield slice(first, min(first + step, tensor.shape[0]))


def compute_device(device: torch.device) -> torch.device:
    """Return the current GPU, or ``device`` where there is none.

    A base that is not wrapped yet lies in host memory; the GPU changes it faster, with the same bits.
    """
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device
