"""Decompositions of stacks of r x r matrices, in float64 and without waiting for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels

# A pivot of the Cholesky factorization, relative to its diagonal entry, is the squared sine of the angle
# between a row of the factor and the rows before it. Rounding in an fp64 Gram leaves about r * 2e-16.
RELATIVE_PIVOT = 1e-13


# Scaled Newton reaches fp64 accuracy in 9 steps up to cond 1e16 (Higham, Functions of Matrices, 2008, 8.9).
NEWTON_STEPS = 10


# Convergence is quadratic: a step that changes X by less than this leaves an error of its square.
CONVERGED = 1e-8


# So does a step that changes X, now nearly orthogonal, by less than this, after which products alone reach fp64
# accuracy: an error e of the singular values becomes 3/2 e^2 in each of these steps (Higham, Functions of Matrices,
# 2008, 8.3), here 5e-3, 4e-5, 2e-9, 7e-18.
NEARLY_ORTHOGONAL = 0.1


# Up to cond 1e15 and r = 128 that takes at most seven steps; one to spare where nobody looks.
STEPS_TO_NEARLY_ORTHOGONAL = 8


PRODUCT_STEPS = 3


def cholesky(gram: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors ``[..., r, r]`` of Gram matrices, and which have one ``[...]``; the others get ``eye``."""
    finite = torch.isfinite(gram).flatten(-2).all(dim=-1)
    chol, failed = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], gram, eye))
    pivots = torch.diagonal(chol, dim1=-2, dim2=-1).square()
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    full_rank = finite & (failed == 0) & (pivots > RELATIVE_PIVOT * diagonal).all(dim=-1)
    return torch.where(full_rank[..., None, None], chol, eye), full_rank


def inverse_from_cholesky(chol: Tensor, eye: Tensor) -> Tensor:
    """``(L L^T)^-1`` for ``[..., r, r]``; torch.cholesky_inverse takes matrices one by one on a GPU."""
    chol_inverse = torch.linalg.solve_triangular(chol, eye.expand_as(chol), upper=False)
    return chol_inverse.mT @ chol_inverse


def inverted(matrix: Tensor) -> Tensor:
    """Inverses of ``[..., r, r]`` float64, not finite where there is none.

    On a GPU by a kernel where there is one: torch leaves many matrices of more than 16 rows to MAGMA, which waits for
    the device.
    """
    if kernels.usable(matrix.device) and matrix.shape[-1] <= kernels.LARGEST_LORA_RANK:
        from .kernels.launch import invert  # imports Triton, which not every machine has

        return invert(matrix)
    return torch.linalg.inv_ex(matrix)[0]


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal polar factor of ``[..., r, r]`` and the matrix's inverse.

    By Newton's scaled iteration, ``X <- (mu X + X^-T / mu) / 2`` with mu from the Frobenius norms, and at the end
    Schulz's, ``X <- X (3 I - X^T X) / 2``. Matrix products and inverses only, a bounded number of them: an
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
    """Frobenius norms ``[..., 1, 1]``."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part, which takes away what rounding adds."""
    return 0.5 * (matrix + matrix.mT)
