"""BaLoRA (Castin, Nadjahi, Ablin and Peyré, 2026, arXiv 2605.31484): balanced factors after every step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra.decompositions import cholesky
from ..algebra.refactorization import LARGEST_RESIDUAL
from ..algebra.types import Matrices
from .base import FactorMethod, Transform


class BaLoRA(FactorMethod):
    """``A <- Sigma^1/2 V^T`` and ``B <- U Sigma^1/2`` with the singular value decomposition ``B A = U Sigma V^T``.

    Then ``A A^T = B^T B = Sigma``. These are ``S^1/2 A`` and ``B S^-1/2``, with RefLoRA's S, in the basis of the
    singular vectors. A singular vector has two signs; the new factors get those that keep them closest to the old ones.

    The published code leaves Adam's moments as they are, and so does ``carry_moments=False``.
    """

    name = "balora"
    default_warmup_steps = 1  # the published code acts after the first step, when B is no longer zero
    own_settings = frozenset({"carry_moments"})
    needs_full_rank = True

    def solve(self, grams: Matrices) -> Transform:
        transform = Transform({}, {})
        for lora_rank, both in grams.items():
            transform.matrices[lora_rank], transform.solved[lora_rank] = balance(both)
        return transform


def balance(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices that balance pairs of factors.

    With Cholesky factors ``A A^T = L_A L_A^T``, ``B^T B = L_B L_B^T`` the singular values of ``B A`` are those of
    ``L_B^T L_A = U Sigma V^T``, and ``M_A = L_A^-T V Sigma^1/2``, ``M_B = M_A^-T = L_A V Sigma^-1/2``.

    Args:
        grams: ``[2, P, r, r]`` float64, ``A A^T`` and ``B^T B``.

    Returns:
        ``M_A`` and ``M_B`` ``[2, P, r, r]`` float64, and ``solved`` ``[P]`` bool. A pair is not solved if a factor is
        rank-deficient, or so ill-conditioned that the new Gram matrices differ. Its matrices are then the identity.

    The singular value decomposition makes the host wait for a GPU.
    """
    eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    (chol_a, chol_b), full_rank = cholesky(grams, eye)
    product = chol_b.mT @ chol_a
    usable = full_rank.all(dim=0) & torch.isfinite(product).flatten(1).all(dim=-1)
    _, values, vectors_t = torch.linalg.svd(torch.where(usable[:, None, None], product, eye))
    roots = values.sqrt()[:, None, :]
    for_a = torch.linalg.solve_triangular(chol_a.mT, vectors_t.mT * roots, upper=True)
    for_b = (chol_a @ vectors_t.mT) / roots
    matrices = torch.stack([for_a, for_b])
    matrices = matrices * _signs(grams, matrices)
    solved = usable & (_residual(grams, matrices, values, eye) < LARGEST_RESIDUAL)  # NaN compares False
    return torch.where(solved[:, None, None], matrices, eye), solved


def _signs(grams: Tensor, matrices: Tensor) -> Tensor:
    """Return -1 for each new direction with a negative inner product with its old one, else 1; ``[P, 1, r]``.

    The inner product sums over both factors. A sign of its own choice in every step would turn Adam's moments against
    the factors.
    """
    inner = (matrices * grams).sum(dim=(0, -2))
    return torch.where(inner < 0, -1.0, 1.0)[:, None, :]


def _residual(grams: Tensor, matrices: Tensor, values: Tensor, eye: Tensor) -> Tensor:
    """Return the larger of two errors, ``[P]``: of the new Grams against Sigma, and of ``M_B M_A^T`` against I."""
    new = torch.linalg.matrix_norm(matrices.mT @ grams @ matrices - torch.diag_embed(values)).amax(dim=0)
    inverse = torch.linalg.matrix_norm(matrices[1] @ matrices[0].mT - eye)
    return torch.maximum(new / torch.linalg.vector_norm(values, dim=-1), inverse)
