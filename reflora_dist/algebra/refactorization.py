"""The refactorization S from Gram matrices, batched over pairs, in float64.

S is the symmetric positive definite solution of ``S G_A S = G_B`` with ``G_A = A A^T`` and ``G_B = B^T B``
(RefLoRA, Zhang, Li and Giannakis, NeurIPS 2025): the geometric mean of ``G_A^-1`` and ``G_B``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .decompositions import CONVERGED, NEWTON_STEPS, RELATIVE_PIVOT, cholesky, polar, symmetric

# S is accepted only if it solves its defining equation; a well-posed pair leaves below 1e-9.
LARGEST_RESIDUAL = 1e-6


def solve_refactorization(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``S G_A S = G_B`` for a batch of pairs.

    With Cholesky factors ``G_A = L_A L_A^T``, ``G_B = L_B L_B^T`` and the polar decomposition
    ``L_B^T L_A = Q H``, the solution is ``S = L_A^-T H L_A^-1`` and ``S^-1 = L_A H^-1 L_A^T``. The matrix
    ``L_B^T L_A`` has a condition number of at most cond(A) cond(B); the paper's ``G_A^1/2 G_B G_A^1/2`` has the
    square of it.

    Args:
        gram_a: ``[P, r, r]`` float64, ``A A^T`` of every pair.
        gram_b: ``[P, r, r]`` float64, ``B^T B`` of every pair.

    Returns:
        ``S`` ``[P, r, r]``, ``S^-1`` ``[P, r, r]`` (float64, symmetric) and ``solved`` ``[P]`` (bool). A pair is not
        solved if a factor is rank-deficient, or so ill-conditioned that S misses its equation. Its S and S^-1 are
        then the identity, which leaves the pair plain LoRA.

    On a GPU one Triton kernel solves all pairs up to r = 64. Larger r, and CPUs, use batched torch code.
    """
    if kernels.usable(gram_a.device) and gram_a.shape[-1] <= kernels.LARGEST_SOLVED_LORA_RANK:
        from .kernels.launch import solve  # imports Triton, which not every machine has

        arguments = (NEWTON_STEPS, CONVERGED, RELATIVE_PIVOT, LARGEST_RESIDUAL)
        return solve(gram_a.contiguous(), gram_b.contiguous(), *arguments)
    return solve_with_torch(gram_a, gram_b)


def solve_with_torch(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve as :func:`solve_refactorization` does, in torch alone."""
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
    """Return the scalar refactorization of RefLoRA-S, ``s = |B|_F / |A|_F``.

    Args:
        squared_norm_a: ``[P]`` float64, ``|A|_F^2`` of every pair.
        squared_norm_b: ``[P]`` float64, ``|B|_F^2`` of every pair.

    Returns:
        ``s`` ``[P]`` float64 and ``solved`` ``[P]`` (bool). A pair with a zero or non-finite factor has no scale:
        it gets s = 1 and is not solved.
    """
    s = torch.sqrt(squared_norm_b / squared_norm_a)
    solved = torch.isfinite(s) & (s > 0)
    return torch.where(solved, s, 1.0), solved


def _equation_residual(s: Tensor, s_inv: Tensor, gram_a: Tensor, gram_b: Tensor, eye: Tensor) -> Tensor:
    """Return the larger of ``|S G_A S - G_B| / |G_B|`` and ``|S S^-1 - I|`` in Frobenius norms, ``[P]``."""
    equation = torch.linalg.matrix_norm(s @ gram_a @ s - gram_b) / torch.linalg.matrix_norm(gram_b)
    inverse = torch.linalg.matrix_norm(s @ s_inv - eye)
    return torch.maximum(equation, inverse)
