"""Triton kernels over many blocks at once: Gram matrices, and products with r x r matrices.

A launch covers all blocks of one orientation, lora_rank and dtype, whatever their number. One table holds their
addresses, another the tiles (spans of rows of a tall factor) that the programs work on. The order of summation is
fixed, so that equal factors have bit-equal Grams on every rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A table of tiles has five int32 columns: the block; the first and one past the last of its rows (of the tall factor)
# that a program works on; the number of rows of the block; the place of its Gram among those of equal lora_rank.


@triton.jit
def _offsets(rows, columns, length, lora_rank: tl.constexpr, as_columns: tl.constexpr):
    """Return the offset of element (i, c), with c the row of the tall factor, in a block [r, length] or [length, r]."""
    if as_columns:
        return rows.to(tl.int64)[:, None] * length + columns[None, :]
    else:
        return columns.to(tl.int64)[None, :] * lora_rank + rows[:, None]


@triton.jit
def _base(addresses, block, dtype: tl.constexpr, aligned: tl.constexpr):
    address = tl.load(addresses + block)
    if aligned:
        address = tl.multiple_of(address, 16)
    base = address.to(tl.pointer_type(dtype))
    if aligned:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def gram_kernel(
    addresses,  # [blocks] int64
    tiles,  # [programs, 5] int32
    partials,  # [all tiles, r, r] float64
    first_partial,
    lora_rank: tl.constexpr,
    padded: tl.constexpr,  # lora_rank, rounded up to a power of two of at least 16
    width: tl.constexpr,  # rows of the tall factor per load
    as_columns: tl.constexpr,
    dtype: tl.constexpr,
    aligned: tl.constexpr,  # every block, and every row of a block [r, length], begins on a 16-byte boundary
):
    """Compute ``X^T X`` over each tile's rows of the tall factor, one partial Gram per program."""
    program = tl.program_id(0)
    tile = tiles + program * 5
    block = tl.load(tile)
    start = tl.load(tile + 1)
    stop = tl.load(tile + 2)
    length = tl.load(tile + 3)
    if aligned:
        start = tl.multiple_of(start, 16)
        if as_columns:
            length = tl.multiple_of(length, 128 // dtype.primitive_bitwidth)
            stop = tl.multiple_of(stop, 128 // dtype.primitive_bitwidth)
    base = _base(addresses, block, dtype, aligned)
    rows = tl.arange(0, padded)
    gram = tl.zeros([padded, padded], dtype=tl.float64)
    for first in range(start, stop, width):
        columns = first + tl.arange(0, width)
        mask = (rows[:, None] < lora_rank) & (columns[None, :] < stop)
        x = tl.load(base + _offsets(rows, columns, length, lora_rank, as_columns), mask=mask, other=0.0).to(tl.float64)
        gram = tl.dot(x, tl.trans(x), gram, out_dtype=tl.float64)
    inside = (rows[:, None] < lora_rank) & (rows[None, :] < lora_rank)
    out = partials + (first_partial + program).to(tl.int64) * (lora_rank * lora_rank)
    tl.store(out + rows[:, None] * lora_rank + rows[None, :], gram, mask=inside)


@triton.jit
def sum_kernel(
    partials,  # [all tiles, r, r] float64
    spans,  # [grams, 2] int32: the part of `order` for each Gram, first and one past the last
    order,  # [all tiles] int32: numbers of partial Grams
    grams,  # [grams, r, r] float64
    size: tl.constexpr,  # r * r
    padded: tl.constexpr,  # the next power of two
):
    """Sum each Gram's partial Grams in a fixed order; a Gram without any is zero."""
    gram = tl.program_id(0)
    first = tl.load(spans + 2 * gram)
    stop = tl.load(spans + 2 * gram + 1)
    lanes = tl.program_id(1) * padded + tl.arange(0, padded)
    mask = lanes < size
    total = tl.zeros([padded], dtype=tl.float64)
    for position in range(first, stop):
        tile = tl.load(order + position).to(tl.int64)
        total += tl.load(partials + tile * size + lanes, mask=mask, other=0.0)
    tl.store(grams + gram.to(tl.int64) * size + lanes, total, mask=mask)


@triton.jit
def multiply_kernel(
    addresses,  # [blocks] int64
    tiles,  # [programs, 5] int32
    matrices,  # [2 pairs, r, r] float64
    lora_rank: tl.constexpr,
    padded: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,  # terms of a product (r in all) per load
    as_columns: tl.constexpr,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
):
    """Compute ``X <- X M`` over each tile's rows of the tall factor, in float64, rounded once."""
    tile = tiles + tl.program_id(0) * 5
    block = tl.load(tile)
    start = tl.load(tile + 1)
    stop = tl.load(tile + 2)
    length = tl.load(tile + 3)
    slot = tl.load(tile + 4).to(tl.int64)
    if aligned:
        start = tl.multiple_of(start, 16)
        if as_columns:
            length = tl.multiple_of(length, 128 // dtype.primitive_bitwidth)
            stop = tl.multiple_of(stop, 128 // dtype.primitive_bitwidth)
    base = _base(addresses, block, dtype, aligned)
    matrix = matrices + slot * (lora_rank * lora_rank)
    rows = tl.arange(0, padded)
    inner = tl.arange(0, depth)
    for first in range(start, stop, width):
        columns = first + tl.arange(0, width)
        product = tl.zeros([padded, width], dtype=tl.float64)
        # formed as M^T X^T, whatever the orientation of the block
        for k in tl.static_range(0, padded, depth):
            x_mask = ((k + inner)[:, None] < lora_rank) & (columns[None, :] < stop)
            x = tl.load(base + _offsets(k + inner, columns, length, lora_rank, as_columns), mask=x_mask, other=0.0)
            m_mask = (rows[:, None] < lora_rank) & ((k + inner)[None, :] < lora_rank)
            m = tl.load(matrix + rows[:, None] + (k + inner)[None, :] * lora_rank, mask=m_mask, other=0.0)
            product = tl.dot(m, x.to(tl.float64), product, out_dtype=tl.float64)
        mask = (rows[:, None] < lora_rank) & (columns[None, :] < stop)
        tl.store(base + _offsets(rows, columns, length, lora_rank, as_columns), product.to(dtype), mask=mask)
