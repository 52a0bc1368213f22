"""LoRA-Muon (Cesista, Simal, Crowson and Biderman, 2026, arXiv 2606.12921): spectral steps on the product ``s B A``.

Let m be the moving average of a tall factor's gradient, and R the inverse square root of the other factor's Gram
matrix. The step of the factor is ``-(lr / 2) msign(m R) R``, and ``msign(X) = X (X^T X)^(-1/2)`` replaces the singular
values of X by 1. So each factor changes the product by a matrix of spectral norm ``lr / 2``. Everything follows from
the Gram matrices of X and m: ``(m R)^T (m R) = R (m^T m) R``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.decompositions import symmetric
from ..algebra.roots import pseudo_inverse_root
from ..algebra.types import Matrices
from .base import OptimizerMethod


class LoRAMuonMethod(OptimizerMethod):
    """LoRA-Muon as a method; ``reflora_dist.LoRAMuon`` is its optimizer, and :func:`muon_update` its step."""

    name = "lora-muon"
    gram_width = 1
    channels_there = 2  # weights and moments
    channels_back = 1

    @classmethod
    def reduced_values(cls, lora_rank: int) -> int:
        """Count two Grams for each factor: its own and its moment's."""
        return 2 * super().reduced_values(lora_rank)


class MuonUpdate(NamedTuple):
    """The result of a step.

    Attributes:
        matrices: M, ``{r: [2, P_r, 2 r, r]}`` float64; ``[X, m] M`` is the new X.
        deficient: ``{r: [P_r]}`` bool; True if a factor of the pair has not full rank, so that the other factor moves
            only in the directions that its rows span.
    """

    matrices: Matrices
    deficient: dict[int, Tensor]


def muon_update(
    factor_grams: Matrices, moment_grams: Matrices, lr: Matrices, decay: Matrices, inverse_scaling: Matrices
) -> MuonUpdate:
    """Return one step of the paper's algorithm 1.

    Pseudo-inverses take the place of inverse roots that do not exist. So where ``B = 0``, lora_A stays as it is, and
    lora_B takes its whole step. A pair that is not finite becomes not finite altogether, as with AdamW.

    Args:
        factor_grams: ``{r: [2, P_r, r, r]}`` float64, ``A A^T`` and ``B^T B``.
        moment_grams: ``{r: [2, P_r, r, r]}`` float64, ``m^T m`` of lora_A's and lora_B's moment, both tall.
        lr: learning rate of each factor, ``{r: [2, P_r]}`` float64.
        decay: ``sqrt(1 - lr * weight_decay)`` of each factor, ``{r: [2, P_r]}`` float64.
        inverse_scaling: ``1 / |s|`` of the pairs' updates ``s B A``, ``{r: [P_r]}`` float64; 0 for s = 0.
    """
    update = MuonUpdate({}, {})
    for r, factors in factor_grams.items():
        roots = pseudo_inverse_root(factors)
        other = roots.flip(0)
        # rounding leaves the product of three symmetric matrices not quite symmetric
        sign = pseudo_inverse_root(symmetric(other @ moment_grams[r] @ other))
        size = 0.5 * lr[r] * inverse_scaling[r] / decay[r]
        from_moment = -_matrix(size) * (other @ sign @ other)
        eye = torch.eye(r, dtype=factors.dtype, device=factors.device)
        # 0 where all is finite, else NaN: a rank that holds only finite rows of the pair cannot see the others
        broken = 0 * (factors + moment_grams[r]).sum(dim=(-2, -1)).sum(dim=0)
        kept = (_matrix(decay[r]) * eye) + _matrix(broken)
        update.matrices[r] = torch.cat([kept, from_moment], dim=-2)
        update.deficient[r] = (_rank(roots, factors) < r - 0.5).any(dim=0)
    return update


def _rank(root: Tensor, gram: Tensor) -> Tensor:
    """Return the rank of each Gram matrix, a float: the trace of the projector ``N G N`` on its range."""
    return torch.diagonal(root @ gram @ root, dim1=-2, dim2=-1).sum(dim=-1)


def _matrix(values: Tensor) -> Tensor:
    return values[..., None, None]
