"""Triton kernels for the refactorization S and for inverses: one program per pair, without the host.

The algebra is that of ``refactorization.solve_with_torch``, the oracle, with one difference: Newton's iteration runs
until it has converged, without Schulz's steps. Matrices are padded to a power of two with an identity block, which no
operation mixes with the rest. To change its layout (transposed, or an operand of a product) a matrix goes through a few
KiB of global scratch memory, which stay in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(address, lora_rank: tl.constexpr, padded: tl.constexpr, diagonal: tl.constexpr):
    """Load ``[lora_rank, lora_rank]`` as ``[padded, padded]``, with ``diagonal`` on the padding's diagonal."""
    rows = tl.arange(0, padded)[:, None]
    columns = tl.arange(0, padded)[None, :]
    inside = (rows < lora_rank) & (columns < lora_rank)
    padding = tl.where(rows == columns, diagonal, 0.0).to(tl.float64)
    return tl.where(inside, tl.load(address + rows * lora_rank + columns, mask=inside, other=0.0), padding)


@triton.jit
def _store(address, matrix, lora_rank: tl.constexpr, padded: tl.constexpr):
    rows = tl.arange(0, padded)[:, None]
    columns = tl.arange(0, padded)[None, :]
    tl.store(address + rows * lora_rank + columns, matrix, mask=(rows < lora_rank) & (columns < lora_rank))


@triton.jit
def _put(scratch, matrix, padded: tl.constexpr):
    """Write a padded matrix to scratch memory, where every thread of the program can read it afterwards."""
    rows = tl.arange(0, padded)[:, None]
    columns = tl.arange(0, padded)[None, :]
    tl.debug_barrier()  # some threads may still be reading the old matrix
    tl.store(scratch + rows * padded + columns, matrix)
    tl.debug_barrier()


@triton.jit
def _get(scratch, padded: tl.constexpr, transposed: tl.constexpr):
    rows = tl.arange(0, padded)[:, None]
    columns = tl.arange(0, padded)[None, :]
    if transposed:
        return tl.load(scratch + columns * padded + rows)
    else:
        return tl.load(scratch + rows * padded + columns)


@triton.jit
def _product(left, right, padded: tl.constexpr, left_transposed: tl.constexpr, right_transposed: tl.constexpr):
    """Return the product of two matrices in scratch memory."""
    rows = tl.arange(0, padded)
    inner = tl.arange(0, 16)
    total = tl.zeros([padded, padded], dtype=tl.float64)
    for first in range(0, padded, 16):
        k = first + inner
        if left_transposed:
            a = tl.load(left + k[None, :] * padded + rows[:, None])
        else:
            a = tl.load(left + rows[:, None] * padded + k[None, :])
        if right_transposed:
            b = tl.load(right + rows[None, :] * padded + k[:, None])
        else:
            b = tl.load(right + k[:, None] * padded + rows[None, :])
        total = tl.dot(a, b, total, out_dtype=tl.float64)
    return total


@triton.jit
def _cholesky(gram, relative_pivot: tl.constexpr, padded: tl.constexpr):
    """Return the lower Cholesky factor, and 1 if every pivot is large enough, else 0."""
    rows = tl.arange(0, padded)
    chol = tl.zeros([padded, padded], dtype=tl.float64)
    diagonal = tl.sum(tl.where(rows[:, None] == rows[None, :], gram, 0.0), axis=1)
    full_rank = 1
    for k in range(padded):
        column = tl.sum(tl.where(rows[None, :] == k, gram, 0.0), axis=1)
        row = tl.sum(tl.where(rows[:, None] == k, gram, 0.0), axis=0)
        pivot = tl.sum(tl.where(rows == k, column, 0.0))
        least = tl.sum(tl.where(rows == k, diagonal, 0.0)) * relative_pivot
        full_rank = full_rank & ((pivot > least) & (pivot < float("inf"))).to(tl.int32)  # NaN compares False
        root = tl.sqrt(pivot)
        column = tl.where(rows >= k, column / root, 0.0)
        row = tl.where(rows >= k, row / root, 0.0)
        chol = tl.where(rows[None, :] == k, column[:, None], chol)
        gram = gram - column[:, None] * row[None, :]
    return chol, full_rank


@triton.jit
def _invert(matrix, scratch, padded: tl.constexpr):
    """Write the inverse to scratch memory, by Gauss-Jordan exchange steps with partial pivoting."""
    rows = tl.arange(0, padded)
    column_of_row = tl.zeros([padded], dtype=tl.int32)
    row_of_column = tl.zeros([padded], dtype=tl.int32)
    used = tl.zeros([padded], dtype=tl.int32)
    x = matrix
    for k in range(padded):
        column = tl.sum(tl.where(rows[None, :] == k, x, 0.0), axis=1)
        pivot_row = tl.argmax(tl.where(used == 0, tl.abs(column), -1.0), axis=0)
        row = tl.sum(tl.where(rows[:, None] == pivot_row, x, 0.0), axis=0)
        inverse = 1.0 / tl.sum(tl.where(rows == k, row, 0.0))
        scaled = row * inverse
        x = x - column[:, None] * scaled[None, :]
        x = tl.where(rows[None, :] == k, (column * inverse)[:, None], x)
        replaced = tl.where(rows == k, inverse, -scaled)
        x = tl.where(rows[:, None] == pivot_row, replaced[None, :], x)
        used = tl.where(rows == pivot_row, 1, used)
        column_of_row = tl.where(rows == pivot_row, k, column_of_row)
        row_of_column = tl.where(rows == k, pivot_row, row_of_column)
    tl.debug_barrier()
    tl.store(scratch + column_of_row[:, None] * padded + row_of_column[None, :], x)
    tl.debug_barrier()


@triton.jit
def invert_kernel(
    matrices,  # [matrices, r, r] float64
    inverses,  # likewise
    scratch,  # [matrices, padded, padded] float64
    lora_rank: tl.constexpr,
    padded: tl.constexpr,
):
    """Invert one matrix per program."""
    program = tl.program_id(0).to(tl.int64)
    place = program * (lora_rank * lora_rank)
    room = scratch + program * (padded * padded)
    matrix = _load(matrices + place, lora_rank, padded, 1.0)
    nothing = tl.sum(tl.sum(matrix * 0.0, axis=1), axis=0)  # 0, or NaN if an entry is not finite: pivoting may hide it
    _invert(matrix, room, padded)
    _store(inverses + place, _get(room, padded, False) + nothing, lora_rank, padded)


@triton.jit
def _solve_upper(upper, right, padded: tl.constexpr):
    """Return ``upper^-1 right``, by substitution from the last row."""
    rows = tl.arange(0, padded)
    solution = right
    for step in range(padded):
        k = padded - 1 - step
        column = tl.sum(tl.where(rows[None, :] == k, upper, 0.0), axis=1)
        pivot = tl.sum(tl.where(rows == k, column, 0.0))
        row = tl.sum(tl.where(rows[:, None] == k, solution, 0.0), axis=0) / pivot
        above = tl.where(rows < k, column, 0.0)
        solution = tl.where(rows[:, None] == k, row[None, :], solution - above[:, None] * row[None, :])
    return solution


@triton.jit
def _norm(matrix):
    return tl.sqrt(tl.sum(tl.sum(matrix * matrix, axis=1), axis=0))


@triton.jit
def solve_kernel(
    gram_a,  # [pairs, r, r] float64
    gram_b,  # likewise
    s_out,  # [pairs, r, r] float64
    s_inv_out,  # likewise
    solved_out,  # [pairs] int8
    scratch,  # [pairs, 4, padded, padded] float64
    lora_rank: tl.constexpr,
    padded: tl.constexpr,
    newton_steps: tl.constexpr,
    converged: tl.constexpr,
    relative_pivot: tl.constexpr,
    largest_residual: tl.constexpr,
):
    """Write S and its inverse for one pair; the identity if a factor is rank-deficient or S misses its equation."""
    pair = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = lora_rank * lora_rank
    area: tl.constexpr = padded * padded
    gram_a_at = gram_a + pair * size
    gram_b_at = gram_b + pair * size
    first = scratch + pair * (4 * area)
    second, third, fourth = first + area, first + 2 * area, first + 3 * area
    rows = tl.arange(0, padded)
    eye = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0).to(tl.float64)
    inside = (rows[:, None] < lora_rank) & (rows[None, :] < lora_rank)

    chol_a, full_rank_a = _cholesky(_load(gram_a_at, lora_rank, padded, 1.0), relative_pivot, padded)
    chol_b, full_rank_b = _cholesky(_load(gram_b_at, lora_rank, padded, 1.0), relative_pivot, padded)
    full_rank = full_rank_a & full_rank_b
    chol_a = tl.where(full_rank == 1, chol_a, eye)
    chol_b = tl.where(full_rank == 1, chol_b, eye)
    _put(first, chol_a, padded)
    _put(second, chol_b, padded)
    product = _product(second, first, padded, True, False)
    # scaled to norm 1, so that the padding's singular values of 1 do not widen the spectrum
    norm = _norm(tl.where(inside, product, 0.0))
    product = tl.where(inside, product / norm, eye)
    _put(second, product, padded)

    # the polar factor of the product, by Newton's scaled iteration
    _invert(product, third, padded)
    x = product
    inverse = _get(third, padded, True)  # transposed, as everywhere below
    change = tl.full([], 1.0, tl.float64)
    steps = 0
    while (change > converged) & (steps < newton_steps):
        mu = tl.sqrt(_norm(inverse) / _norm(x))
        updated = 0.5 * (mu * x + inverse / mu)
        change = _norm(updated - x) / _norm(updated)
        x = updated
        _invert(x, fourth, padded)
        inverse = _get(fourth, padded, True)
        steps += 1
    _put(fourth, 0.5 * (x + inverse), padded)

    polar = _product(fourth, second, padded, True, False)
    polar_inv = _product(third, fourth, padded, False, False)
    _put(third, polar_inv, padded)
    polar_inv = 0.5 * (polar_inv + _get(third, padded, True)) / norm
    _put(second, polar, padded)
    polar = 0.5 * (polar + _get(second, padded, True)) * norm

    _put(third, polar_inv, padded)
    half = _product(first, third, padded, False, False)  # L_A H^-1
    _put(fourth, half, padded)
    s_inv = _product(fourth, first, padded, False, True)
    _put(third, s_inv, padded)
    s_inv = 0.5 * (s_inv + _get(third, padded, True))
    upper = _get(first, padded, True)
    _put(second, _solve_upper(upper, polar, padded), padded)
    s = _solve_upper(upper, _get(second, padded, True), padded)
    _put(second, s, padded)
    s = 0.5 * (s + _get(second, padded, True))

    # residuals of the equation and of the inverse
    _put(second, s, padded)
    _put(third, s_inv, padded)
    miss_inverse = _norm(tl.where(inside, _product(second, third, padded, False, False) - eye, 0.0))
    _put(first, _load(gram_a_at, lora_rank, padded, 1.0), padded)
    half = _product(second, first, padded, False, False)
    _put(fourth, half, padded)
    expected = _load(gram_b_at, lora_rank, padded, 0.0)
    miss = _norm(tl.where(inside, _product(fourth, second, padded, False, False) - expected, 0.0)) / _norm(expected)
    good = (full_rank == 1) & (miss < largest_residual) & (miss_inverse < largest_residual)  # NaN compares False

    _store(s_out + pair * size, tl.where(good, s, eye), lora_rank, padded)
    _store(s_inv_out + pair * size, tl.where(good, s_inv, eye), lora_rank, padded)
    tl.store(solved_out + pair, good.to(tl.int8))
