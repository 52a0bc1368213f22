"""From Gram matrices to the refactorization S: batched, in float64, without ranks.

S is the symmetric positive definite solution of ``S G_A S = G_B`` with ``G_A = A A^T`` and ``G_B = B^T B``
(RefLoRA, Zhang, Li and Giannakis, NeurIPS 2025): the geometric mean of ``G_A^-1`` and ``G_B``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels

# A pivot of the Cholesky factorization, relative to its diagonal entry, is the squared sine of the angle
# between a row of the factor and the rows before it. Rounding in an fp64 Gram leaves about r * 2e-16.
RELATIVE_PIVOT = 1e-13
# S is accepted only if it solves its defining equation; a well-posed pair leaves below 1e-9.
LARGEST_RESIDUAL = 1e-6
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


def solve_refactorization(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``S G_A S = G_B`` for a batch of pairs.

    With Cholesky factors ``G_A = L_A L_A^T``, ``G_B = L_B L_B^T`` and the polar decomposition
    ``L_B^T L_A = Q H``, the solution is ``S = L_A^-T H L_A^-1`` and ``S^-1 = L_A H^-1 L_A^T``. Working on
    ``L_B^T L_A`` keeps its condition number at cond(A) cond(B); the matrix ``G_A^1/2 G_B G_A^1/2`` of the
    paper would square it.

    Args:
        gram_a: ``[P, r, r]`` float64, ``A A^T`` of every pair.
        gram_b: ``[P, r, r]`` float64, ``B^T B`` of every pair.

    Returns:
        ``S`` ``[P, r, r]``, ``S^-1`` ``[P, r, r]`` (float64, symmetric) and ``solved`` ``[P]`` (bool). Where a
        factor is rank-deficient, or so ill-conditioned that S misses its equation, ``solved`` is False and
        S and S^-1 are the identity, which leaves that pair plain LoRA.

    On a GPU one Triton kernel does it up to r = 64; beyond, and on a CPU, batched torch code.
    """
    if kernels.usable(gram_a.device) and gram_a.shape[-1] <= kernels.LARGEST_SOLVED_LORA_RANK:
        from .kernels.launch import solve  # imports Triton, which not every machine has

        arguments = (NEWTON_STEPS, CONVERGED, RELATIVE_PIVOT, LARGEST_RESIDUAL)
        return solve(gram_a.contiguous(), gram_b.contiguous(), *arguments)
    return solve_with_torch(gram_a, gram_b)


def solve_with_torch(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`solve_refactorization` without the kernel."""
    eye = torch.eye(gram_a.shape[-1], dtype=gram_a.dtype, device=gram_a.device)
    (chol_a, chol_b), full_rank_each = cholesky(torch.stack([gram_a, gram_b]), eye)
    full_rank = full_rank_each.all(dim=0)

    product = torch.where(full_rank[:, None, None], chol_b.mT @ chol_a, eye)
    orthogonal, product_inv = polar(product)
    root = symmetric(orthogonal.mT @ product)
    root_inv = symmetric(product_inv @ orthogonal)

    left = torch.linalg.solve_triangular(chol_a.mT, root, upper=True)
    s = symmetric(torch.linalg.solve_triangular(chol_a.mT, left.mT, upper=True))
    s_inv = symmetric(chol_a @ root_inv @ chol_a.mT)

    solved = full_rank & (_equation_residual(s, s_inv, gram_a, gram_b, eye) < LARGEST_RESIDUAL)  # NaN compares False
    return torch.where(solved[:, None, None], s, eye), torch.where(solved[:, None, None], s_inv, eye), solved


def solve_scale(squared_norm_a: Tensor, squared_norm_b: Tensor) -> tuple[Tensor, Tensor]:
    """The scalar refactorization of RefLoRA-S, ``s = |B|_F / |A|_F``.

    Args:
        squared_norm_a: ``[P]`` float64, ``|A|_F^2`` of every pair.
        squared_norm_b: ``[P]`` float64, ``|B|_F^2`` of every pair.

    Returns:
        ``s`` ``[P]`` float64 and ``solved`` ``[P]`` (bool); a pair with a zero or non-finite factor has no
        scale, and gets s = 1.
    """
    s = torch.sqrt(squared_norm_b / squared_norm_a)
    solved = torch.isfinite(s) & (s > 0)
    return torch.where(solved, s, 1.0), solved


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


def _equation_residual(s: Tensor, s_inv: Tensor, gram_a: Tensor, gram_b: Tensor, eye: Tensor) -> Tensor:
    """The larger of ``|S G_A S - G_B| / |G_B|`` and ``|S S^-1 - I|``, Frobenius norms, ``[P]``."""
    equation = torch.linalg.matrix_norm(s @ gram_a @ s - gram_b) / torch.linalg.matrix_norm(gram_b)
    inverse = torch.linalg.matrix_norm(s @ s_inv - eye)
    return torch.maximum(equation, inverse)


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part, which takes away what rounding adds."""
    return 0.5 * (matrix + matrix.mT)
