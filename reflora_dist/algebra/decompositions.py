"""Decompositions of stacks of r x r matrices, in float64 and without a synchronization with the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels

# A Cholesky pivot, relative to its diagonal entry, is the squared sine of the angle between a row of the factor and
# the span of the rows before it. Rounding in a float64 Gram matrix leaves about r * 2e-16.
RELATIVE_PIVOT = 1e-13


# Scaled Newton reaches float64 accuracy in 9 steps up to cond 1e16 (Higham, Functions of Matrices, 2008, 8.9).
NEWTON_STEPS = 10


# Convergence is quadratic: after a step that changes X by less than this, the error is about its square.
CONVERGED = 1e-8


# After a Newton step that changes X by less than this, X is nearly orthogonal, and Schulz's steps, which need products
# alone, reach float64 accuracy. Each turns an error e of the singular values into 3/2 e^2 (Higham, Functions of
# Matrices, 2008, 8.3): 5e-3, 4e-5, 2e-9, 7e-18.
NEARLY_ORTHOGONAL = 0.1


# Up to cond 1e15 and r = 128 that takes at most seven steps. A GPU does not test for convergence, hence one to spare.
STEPS_TO_NEARLY_ORTHOGONAL = 8


PRODUCT_STEPS = 3


def cholesky(gram: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower Cholesky factors of Gram matrices, and whether each matrix has full rank.

    Args:
        gram: ``[..., r, r]``.
        eye: the identity ``[r, r]``; it replaces the factor of a matrix that is rank-deficient or not finite.

    Returns:
        Factors ``[..., r, r]`` and ``full_rank`` ``[...]`` bool.
    """
    finite = torch.isfinite(gram).flatten(-2).all(dim=-1)
    chol, failed = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], gram, eye))
    pivots = torch.diagonal(chol, dim1=-2, dim2=-1).square()
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    full_rank = finite & (failed == 0) & (pivots > RELATIVE_PIVOT * diagonal).all(dim=-1)
    return torch.where(full_rank[..., None, None], chol, eye), full_rank


def inverse_from_cholesky(chol: Tensor, eye: Tensor) -> Tensor:
    """Return ``(L L^T)^-1`` for L ``[..., r, r]``; on a GPU torch.cholesky_inverse would loop over the matrices."""
    chol_inverse = torch.linalg.solve_triangular(chol, eye.expand_as(chol), upper=False)
    return chol_inverse.mT @ chol_inverse


def inverted(matrix: Tensor) -> Tensor:
    """Return the inverses of ``[..., r, r]`` float64; the inverse of a singular matrix is not finite.

    On a GPU a Triton kernel inverts where it can: torch passes batches with r > 16 to MAGMA, which synchronizes with
    the device.
    """
    if kernels.usable(matrix.device) and matrix.shape[-1] <= kernels.LARGEST_LORA_RANK:
        from .kernels.launch import invert  # imports Triton, which not every machine has

        return invert(matrix)
    return torch.linalg.inv_ex(matrix)[0]


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthogonal polar factor of ``[..., r, r]`` and the inverse of the matrix.

    Newton's scaled iteration is ``X <- (mu X + X^-T / mu) / 2``, with mu from the Frobenius norms. The last steps are
    Schulz's, ``X <- X (3 I - X^T X) / 2``. Both need a bounded number of matrix products and inverses only; an
    eigendecomposition would make a GPU wait for the host.
    """
    x = matrix
    inverse = first_inverse = inverted(x)
    for step in range(STEPS_TO_NEARLY_ORTHOGONAL):
        if step:
            inverse = inverted(x)
        mu = (frobenius(inverse) / frobenius(x)).sqrt()
        previous, x = x, torch.lerp(inverse.mT / mu, mu * x, 0.5)
        # reading the result is free on a CPU, and would make a GPU wait
        if step > 1 and x.device.type == "cpu" and bool((frobenius(x - previous) <= NEARLY_ORTHOGONAL).all()):
            break
    for _ in range(PRODUCT_STEPS):
        x = (x @ (x.mT @ x)).mul_(-0.5).add_(x, alpha=1.5)
    return x, first_inverse


def frobenius(matrix: Tensor) -> Tensor:
    """Return Frobenius norms ``[..., 1, 1]``."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part, which removes the asymmetry due to rounding."""
    return 0.5 * (matrix + matrix.mT)
