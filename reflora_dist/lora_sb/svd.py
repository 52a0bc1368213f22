"""Truncated SVD of a matrix whose rows are distributed, by a randomized range finder. Nothing here knows about ranks.

Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Sums a small matrix over all holders of rows; in one process it returns its argument.
Sum = Callable[[Tensor], Tensor]

_ROWS_AT_ONCE = 1024  # rows of the matrix that are held in float64 at a time
_LEAST_SINGULAR_VALUE = 1e-7  # relative to the largest; rounding in a float64 Gram turns zero into about 1e-8


def truncated_svd(
    rows: Tensor, rank: int, *, sum_rows: Sum, oversampling: int, power_iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular values of a matrix ``M``, and their vectors; each caller holds rows of M.

    Products with M are local and in float64; only ``M^T (M Q)`` and Gram matrices are summed over the callers. So the
    distribution of the rows changes the result only by float64 rounding. If all callers get the same sums, ``values``
    and ``right`` are the same for all.

    Shapes (m_k: rows held here, perhaps 0; q = rank + oversampling, at most n):
        rows    [m_k, n]     any floating or integer dtype
        left    [m_k, rank]  float64; the rows of U that belong to ``rows``
        values  [rank]       float64, descending
        right   [rank, n]    float64; V^T; the first of the largest entries of each row is positive

    Args:
        rows: this caller's rows.
        rank: number of singular values; at most min(m, n).
        sum_rows: sums ``[n, q]``, ``[q, q]`` and ``[rank, rank]`` float64 over all callers.
        oversampling: number of further random directions; they speed up convergence.
        power_iterations: number of products with ``M^T M`` beyond the first. Slowly decaying singular values, as those
            of sign matrices, need several.
        seed: seed of the random directions, which otherwise depend only on n and q.

    Raises:
        ValueError: the matrix has fewer than ``rank`` nonzero singular values.
    """
    width = min(rank + oversampling, rows.shape[1])
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device gets the same values
    basis = torch.randn(rows.shape[1], width, generator=generator, dtype=torch.float64).to(rows.device)
    for _ in range(power_iterations + 1):
        basis = torch.linalg.qr(sum_rows(_gram_times(rows, basis)))[0]
    image = _times(rows, basis)
    squares, vectors = torch.linalg.eigh(sum_rows(image.T @ image))
    # eigh sorts in ascending order; rounding can make a zero eigenvalue negative
    values = squares.flip(0)[:rank].clamp(min=0).sqrt()
    vectors = vectors.flip(1)[:, :rank]
    if rank > width or not bool(values[-1] > _LEAST_SINGULAR_VALUE * values[0]):
        raise ValueError(f"the matrix has less than {rank=} singular values that are not zero: {values.tolist()}")
    right = (basis @ vectors).T
    signs = _signs(right)
    left = _orthonormal(image @ vectors / values, sum_rows) * signs
    return left, values, right * signs[:, None]


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    """Return the local rows of ``M X``."""
    product = factor.new_empty(rows.shape[0], factor.shape[1])
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        product[part] = rows[part].double() @ factor
    return product


def _gram_times(rows: Tensor, factor: Tensor) -> Tensor:
    """Return the local rows' summand of ``M^T M X``."""
    product = torch.zeros_like(factor)
    for part in rows.split(_ROWS_AT_ONCE):
        wide = part.double()
        product += wide.T @ (wide @ factor)
    return product


def _orthonormal(columns: Tensor, sum_rows: Sum) -> Tensor:
    """Return the nearest matrix with orthonormal columns.

    This removes the error that the division by small singular values has amplified.
    """
    squares, vectors = torch.linalg.eigh(sum_rows(columns.T @ columns))
    return columns @ (vectors * squares.rsqrt()) @ vectors.T


def _signs(right: Tensor) -> Tensor:
    """Return the sign per row that makes the first of its largest entries positive.

    Entries above 0.9 of the maximum count as largest, since the entries of a sign matrix's singular vector can all be
    equal up to rounding.
    """
    sizes = right.abs()
    first = (sizes > 0.9 * sizes.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return right.gather(1, first).squeeze(1).sign()
