"""RefLoRA (Zhang, Li and Giannakis, NeurIPS 2025): gradients refactored with the full matrix S."""

from __future__ import annotations

import torch

from ..algebra.refactorization import solve_refactorization
from ..algebra.types import Matrices
from .base import GradientMethod, Transform


class RefLoRA(GradientMethod):
    """``grad_A <- S^-1 grad_A`` and ``grad_B <- grad_B S`` with ``S (A A^T) S = B^T B``.

    The published code leaves Adam's moments of the warm-up as they are, and so does ``carry_moments=False``.
    """

    name = "reflora"
    default_warmup_steps = 100
    own_settings = frozenset({"carry_moments"})
    needs_full_rank = True

    def solve(self, grams: Matrices) -> Transform:
        transform = Transform({}, {})
        for lora_rank, (gram_a, gram_b) in grams.items():
            s, s_inv, solved = solve_refactorization(gram_a, gram_b)
            transform.matrices[lora_rank], transform.solved[lora_rank] = torch.stack([s_inv, s]), solved
        return transform
