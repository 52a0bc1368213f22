"""LoRA-Pro (Wang et al., 2024, arXiv 2407.18242): gradients whose joint step is closest to full fine-tuning's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra.decompositions import CONVERGED, NEWTON_STEPS, cholesky, frobenius, inverse_from_cholesky, inverted
from ..algebra.types import Matrices
from .base import GradientMethod, Transform

_LARGEST_RESIDUAL = 1e-6  # residual of the Sylvester equation, relative to its right-hand side


class LoRAPro(GradientMethod):
    """The closed form of the paper's theorem 2.1, with the free matrix X of theorem 2.3.

    With ``G_A = A A^T`` and ``G_B = B^T B`` ::

        grad_A <- G_B^-1 grad_A / s^2 + X A
        grad_B <- (I - B G_B^-1 B^T) grad_B G_A^-1 / s^2 - B X
        G_B X + X G_A = -G_B^-1 grad_A A^T / s^2

    Then ``s B grad_A + s grad_B A`` is the best approximation of the whole weight's gradient that a step on the
    factors can make, and X keeps the new gradients closest to the old ones. The optimizer's moments remain moments of
    the factors' gradients. ``grad_A A^T`` equals ``B^T grad_B``, so each side uses the one with its own gradient.
    """

    name = "lora-pro"
    default_warmup_steps = 100
    needs_full_rank = True
    symmetric = False
    uses_gradients = True
    gram_width = 2

    def solve(self, grams: Matrices) -> Transform:
        transform = Transform({}, {})
        for lora_rank, both in grams.items():
            matrices, solved = _solve(both, self.scaling[lora_rank])
            transform.matrices[lora_rank], transform.solved[lora_rank] = matrices, solved
        return transform


def _solve(grams: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices of a :class:`Transform` and ``solved``.

    Args:
        grams: ``[2, P, 2 r, 2 r]`` float64, the Grams of ``[A^T, grad_A^T]`` and ``[B, grad_B]``.
        scaling: s, ``[P]`` float64.

    Returns:
        ``[2, P, 2 r, r]`` float64 and ``[P]`` bool.
    """
    r = grams.shape[-1] // 2
    eye = torch.eye(r, dtype=grams.dtype, device=grams.device)
    chol, full_rank_each = cholesky(grams[..., :r, :r], eye)
    full_rank = full_rank_each.all(dim=0)
    usable = full_rank[:, None, None]
    gram_a, gram_b = torch.where(usable, grams[..., :r, :r], eye)
    inverse_a, inverse_b = torch.where(usable, inverse_from_cholesky(chol, eye), eye)
    squared = (scaling**2)[:, None, None]
    # grad_A A^T and B^T grad_B
    cross_a, cross_b = grams[0, :, r:, :r], grams[1, :, :r, r:]
    scaled = -inverse_b @ torch.stack([cross_a, cross_b]) / squared
    x, residual = solve_sylvester(gram_b.expand_as(scaled), gram_a.expand_as(scaled), scaled)
    solved = full_rank & (residual < _LARGEST_RESIDUAL).all(dim=0)  # NaN compares False

    of_a = torch.cat([x[0].mT, inverse_b / squared], dim=1)
    of_b = torch.cat([scaled[1] @ inverse_a - x[1], inverse_a / squared], dim=1)
    unchanged = torch.cat([torch.zeros_like(eye), eye])
    return torch.where(solved[:, None, None], torch.stack([of_a, of_b]), unchanged), solved


def solve_sylvester(p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``P X + X Q = C`` for symmetric positive definite P and Q, by Newton's iteration for the matrix sign.

    The sign of ``[[P, C], [0, -Q]]`` is ``[[I, 2 X], [0, -I]]`` (Roberts, 1980; Higham, Functions of Matrices, 2008,
    section 2.4). The iteration needs products and inverses only; eigenvectors would make a GPU wait for the host.

    Args:
        p, q, c: ``[..., r, r]`` float64.

    Returns:
        X ``[..., r, r]``, and ``|P X + X Q - C| / |C|`` ``[...]`` in Frobenius norms. If C = 0, the second is
        ``|P X + X Q|``, which is 0.
    """
    p_k, q_k, c_k = p, q, c
    for _ in range(NEWTON_STEPS + 2):  # P and Q together have a wider spectrum than one matrix
        p_inv, q_inv = inverted(torch.stack([p_k, q_k]))
        mu = ((frobenius(p_inv) + frobenius(q_inv)) / (frobenius(p_k) + frobenius(q_k))).sqrt()
        c_k = 0.5 * mu * c_k + (0.5 / mu) * (p_inv @ c_k @ q_inv)
        p_next, q_next = 0.5 * mu * p_k + (0.5 / mu) * p_inv, 0.5 * mu * q_k + (0.5 / mu) * q_inv
        change = (frobenius(p_next - p_k) + frobenius(q_next - q_k)) / (frobenius(p_next) + frobenius(q_next))
        p_k, q_k = p_next, q_next
        # reading the result is free on a CPU, and would make a GPU wait
        if c.device.type == "cpu" and bool((change <= CONVERGED).all()):
            break
    x = 0.5 * c_k
    size = torch.linalg.matrix_norm(c)
    residual = torch.linalg.matrix_norm(p @ x + x @ q - c)
    return x, torch.where(size > 0, residual / size, residual)
