"""Truncated SVD of a matrix whose rows are distributed: a randomized range finder. Nothing here knows about ranks.

Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Sums a small matrix over everybody who holds rows; on one process it returns what it is given.
Sum = Callable[[Tensor], Tensor]

_ROWS_AT_ONCE = 1024  # rows of the matrix that are held in float64 at a time
_LEAST_SINGULAR_VALUE = 1e-7  # beside the largest; a float64 Gram has those of 1e-8 where there are none


def truncated_svd(
    rows: Tensor, rank: int, *, sum_rows: Sum, oversampling: int, power_iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest ``rank`` singular values and vectors of a matrix ``M``, of which this caller holds some rows.

    Products with M are local and in float64; summed are ``M^T (M Q)`` and Grams. So the result depends on how the rows
    are distributed only by rounding in float64, and is the same on every rank where the sum is.

    Shapes (m_k: rows held here, perhaps 0; q = rank + oversampling, at most n):
        rows    [m_k, n]     any floating dtype; integers are taken as they are
        left    [m_k, rank]  float64; the rows of U that belong to ``rows``
        values  [rank]       float64, descending
        right   [rank, n]    float64; V^T, in every row the first of the largest entries positive

    Args:
        rows: this caller's part.
        rank: at most min(m, n).
        sum_rows: sums ``[n, q]``, ``[q, q]`` and ``[rank, rank]`` float64 over all parts.
        oversampling: further random directions, which speed up convergence.
        power_iterations: products with ``M^T M`` beyond the first. Where singular values decay slowly, as those of
            sign matrices do, it takes several.
        seed: of the random directions, which depend on nothing else but n and q.

    Raises:
        ValueError: the matrix has fewer than ``rank`` singular values that are not zero.
    """
    width = min(rank + oversampling, rows.shape[1])
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device gets the same
    basis = torch.randn(rows.shape[1], width, generator=generator, dtype=torch.float64).to(rows.device)
    for _ in range(power_iterations + 1):
        basis = torch.linalg.qr(sum_rows(_gram_times(rows, basis)))[0]
    image = _times(rows, basis)
    squares, vectors = torch.linalg.eigh(sum_rows(image.T @ image))
    # eigh sorts upwards; rounding can leave a zero eigenvalue below zero
    values = squares.flip(0)[:rank].clamp(min=0).sqrt()
    vectors = vectors.flip(1)[:, :rank]
    if rank > width or not bool(values[-1] > _LEAST_SINGULAR_VALUE * values[0]):
        raise ValueError(f"the matrix has less than {rank=} singular values that are not zero: {values.tolist()}")
    right = (basis @ vectors).T
    signs = _signs(right)
    left = _orthonormal(image @ vectors / values, sum_rows) * signs
    return left, values, right * signs[:, None]


def _times(rows: Tensor, factor: Tensor) -> Tensor:
    """``M X``, for the rows held here."""
    product = factor.new_empty(rows.shape[0], factor.shape[1])
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        product[part] = rows[part].double() @ factor
    return product


def _gram_times(rows: Tensor, factor: Tensor) -> Tensor:
    """This part's share of ``M^T M X``."""
    product = torch.zeros_like(factor)
    for part in rows.split(_ROWS_AT_ONCE):
        wide = part.double()
        product += wide.T @ (wide @ factor)
    return product


def _orthonormal(columns: Tensor, sum_rows: Sum) -> Tensor:
    """The nearest matrix with orthonormal columns: takes away what dividing by small singular values has added."""
    squares, vectors = torch.linalg.eigh(sum_rows(columns.T @ columns))
    return columns @ (vectors * squares.rsqrt()) @ vectors.T


def _signs(right: Tensor) -> Tensor:
    """What makes the first of every row's largest entries positive.

    Largest within a tenth: the entries of a sign matrix's singular vector can all be equal but for rounding.
    """
    sizes = right.abs()
    first = (sizes > 0.9 * sizes.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return right.gather(1, first).squeeze(1).sign()
