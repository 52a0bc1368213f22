"""ScaledGD, or Riemannian preconditioning (Tong et al., 2021; for LoRA Zhang and Pilanci, 2024, arXiv 2402.02347)."""

from __future__ import annotations

import torch

from ..algebra.decompositions import cholesky, inverse_from_cholesky
from ..algebra.types import Matrices
from .base import GradientMethod, Transform


class ScaledGD(GradientMethod):
    """``grad_A <- (B^T B + delta I)^-1 grad_A`` and ``grad_B <- grad_B (A A^T + delta I)^-1`` (the paper's equation 2).

    ``delta`` is ``RefLoRAConfig.damping``. A pair with a singular damped Gram keeps its gradients.
    """

    name = "scaled-gd"
    own_settings = frozenset({"damping"})

    def solve(self, grams: Matrices) -> Transform:
        transform = Transform({}, {})
        for lora_rank, both in grams.items():
            eye = torch.eye(lora_rank, dtype=both.dtype, device=both.device)
            factors, full_rank = cholesky(both + self.settings.damping * eye, eye)
            solved = full_rank.all(dim=0)
            inverses = torch.where(solved[:, None, None], inverse_from_cholesky(factors, eye), eye)
            # lora_A's gradient meets the inverse of lora_B's Gram, and the reverse
            transform.matrices[lora_rank], transform.solved[lora_rank] = inverses.flip(0), solved
        return transform
