"""RefLoRA and RefLoRA-S on whole factors in one process, as plainly as the paper states them.

This is the oracle of the sharded implementation: it loops over pairs, without batches and without Gram matrices. S
comes from QR factorizations of the factors themselves, so that it is accurate for ill-conditioned factors too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import RefLoRAConfig

Pair = tuple[Tensor, Tensor]
"""The factors ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]`` of one adapter."""


def refactorization(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return S with ``S (A A^T) S = B^T B`` and its inverse, ``[r, r]`` float64; None if a factor is rank-deficient.

    With ``A^T = Q_A R_A``, ``B = Q_B R_B`` and the singular value decomposition ``R_B R_A^T = U D V^T``, S is
    ``R_A^-1 V D V^T R_A^-T``.
    """
    r_a, r_b = (torch.linalg.qr(factor.double(), mode="r").R for factor in (lora_a.mT, lora_b))
    if any(r.shape[0] < r.shape[1] or _is_singular(r) for r in (r_a, r_b)):
        return None
    _, d, v_t = torch.linalg.svd(r_b @ r_a.mT)
    root = torch.linalg.solve_triangular(r_a, v_t.mT, upper=True) * d.sqrt()
    inverse_root = (r_a.mT @ v_t.mT) / d.sqrt()
    return root @ root.mT, inverse_root @ inverse_root.mT


def _is_singular(triangular: Tensor) -> bool:
    singular_values = torch.linalg.svdvals(triangular)
    return bool(singular_values[-1] <= singular_values[0] * 1e-12)


def refactored(lora_a: Tensor, lora_b: Tensor, grad_a: Tensor, grad_b: Tensor) -> Pair:
    """Return RefLoRA's gradients ``S^-1 grad_A`` and ``grad_B S`` in float64, unchanged if S does not exist."""
    grad_a, grad_b = grad_a.double(), grad_b.double()
    solution = refactorization(lora_a, lora_b)
    if solution is None:
        return grad_a, grad_b
    s, s_inv = solution
    return s_inv @ grad_a, grad_b @ s


@torch.no_grad()
def rescale_(lora_a: Tensor, lora_b: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Rescale both factors to equal norms, and Adam's moments to match, in place (RefLoRA-S)."""
    norm_a, norm_b = (torch.linalg.vector_norm(factor, dtype=torch.float64) for factor in (lora_a, lora_b))
    if norm_a == 0 or norm_b == 0:
        return
    factor = float((norm_b / norm_a).sqrt())
    for tensor, scale in ((lora_a, factor), (lora_b, 1 / factor)):
        tensor.mul_(scale)
        state = optimizer.state.get(tensor, {})
        for key, moment_scale in (("exp_avg", 1 / scale), ("exp_avg_sq", scale**-2), ("max_exp_avg_sq", scale**-2)):
            if key in state:
                state[key].mul_(moment_scale)


class ReferenceRefLoRA:
    """RefLoRA or RefLoRA-S as hooks of a torch optimizer that holds whole factors.

    Args:
        pairs: the factors, which are parameters of ``optimizer``.
        optimizer: an elementwise torch optimizer; for "reflora-s" one of the Adam family.
        config: the method ("reflora" or "reflora-s"; others change nothing) and its schedule.
    """

    def __init__(self, pairs: Sequence[Pair], optimizer: torch.optim.Optimizer, config: RefLoRAConfig) -> None:
        self._pairs = pairs
        self._optimizer = optimizer
        self._config = config
        self._steps = 0
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())
        self._rescale()

    def _before(self) -> None:
        if self._config.method != "reflora" or not self._config.is_due(self._steps):
            return
        for lora_a, lora_b in self._pairs:
            assert lora_a.grad is not None and lora_b.grad is not None
            grad_a, grad_b = refactored(lora_a.detach(), lora_b.detach(), lora_a.grad, lora_b.grad)
            lora_a.grad.copy_(grad_a)
            lora_b.grad.copy_(grad_b)

    def _after(self) -> None:
        self._steps += 1
        self._rescale()

    def _rescale(self) -> None:
        if self._config.method == "reflora-s" and self._config.is_due(self._steps):
            for lora_a, lora_b in self._pairs:
                rescale_(lora_a, lora_b, self._optimizer)
