"""RefLoRA-S (Zhang, Li and Giannakis, NeurIPS 2025): the factors rescaled with a scalar."""

from __future__ import annotations

from torch import Tensor

from ..algebra.refactorization import solve_scale
from .base import Rescaling, RescalingMethod


class RefLoRAS(RescalingMethod):
    """``A <- sqrt(s) A`` and ``B <- B / sqrt(s)`` with ``s = |B|_F / |A|_F``, which makes the norms equal."""

    name = "reflora-s"
    default_warmup_steps = 100

    def solve(self, squared_norms: Tensor) -> Rescaling:
        s, solved = solve_scale(squared_norms[0], squared_norms[1])
        return Rescaling(s.sqrt(), solved)
