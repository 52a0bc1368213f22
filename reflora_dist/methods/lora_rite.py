"""LoRA-RITE (Yen et al., 2024, arXiv 2410.20625): an adaptive step that depends on the factors' product alone.

``X N`` is an orthonormal basis of a tall factor X, with N the inverse square root of its Gram matrix. The *unmagnified*
gradient of a factor is ``U = grad N_other``, with N of the pair's other factor. The moments of U are kept in the other
factor's basis, which turns from step to step. All of this is algebra on r x r matrices, and combinations
``X M + grad M' + moment M''`` with such matrices. Every norm and every turn follows from one Gram of
``[X, grad, moment]``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.decompositions import symmetric
from ..algebra.roots import damped_inverse_root, pseudo_inverse_root
from ..algebra.types import Matrices
from .base import OptimizerMethod


class LoRARiteMethod(OptimizerMethod):
    """LoRA-RITE as a method; ``reflora_dist.LoRARite`` is its optimizer, and :func:`rite_update` its step."""

    name = "lora-rite"
    gram_width = 3  # factor, gradient and moment
    channels_there = 3
    channels_back = 2

    @classmethod
    def reduced_values(cls, lora_rank: int) -> int:
        """Count the Grams, and for each of two factors the packed second moment and the number of steps."""
        return super().reduced_values(lora_rank) + 2 * (packed_size(lora_rank) + 1)

    @classmethod
    def packed_values(cls, lora_rank: int) -> int:
        """Count the second moment and the escaped mass."""
        return packed_size(lora_rank)


def packed_size(lora_rank: int) -> int:
    """Return the number of elements of a factor's second moment (upper triangle) and escaped mass."""
    return lora_rank * (lora_rank + 1) // 2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RiteSettings:
    """Hyperparameters that all factors share, named as in the published code; see :class:`reflora_dist.LoRARite`."""

    eps: float
    clip_unmagnified_grad: float
    update_capping: float
    update_skipping: float
    apply_escape: bool
    balance_param: bool


class Moments(NamedTuple):
    """The state of a step except the first moment, in the basis of the current factors.

    Attributes:
        second: second moments of lora_A and of lora_B, ``{r: [2, P_r, r, r]}`` float64.
        escape: escaped mass, which second moments lost in turns of the basis, ``{r: [2, P_r]}`` float64.
    """

    second: Matrices
    escape: Matrices


class Groups(NamedTuple):
    """Values that differ between factors, each ``{r: [2, P_r]}`` float64.

    Attributes:
        rows: number of rows of the tall factor, in or out.
        lr: learning rate of the optimizer's group.
        weight_decay: weight decay of the optimizer's group.
        beta1, beta2: decays of the first and the second moment, bias-corrected.
    """

    rows: Matrices
    lr: Matrices
    weight_decay: Matrices
    beta1: Matrices
    beta2: Matrices


class Update(NamedTuple):
    """The result of a step.

    Attributes:
        matrices: M, ``{r: [2, P_r, 3 r, 2 r]}`` float64; ``[X, grad, moment] M`` is the new ``[X, moment]``.
        moments: the moments after the step.
        skipped: ``{r: [P_r]}`` bool; True if a gradient of the pair was too large and was skipped.
    """

    matrices: Matrices
    moments: Moments
    skipped: dict[int, Tensor]


class _Gradient(NamedTuple):
    basis: Tensor  # [2, P, r, r]: N of each factor
    second: Tensor  # [2, P, r, r]: U^T U
    kept: Tensor  # [2, P]: 1, or 0 where the gradient is skipped


def rite_update(grams: Matrices, moments: Moments, groups: Groups, settings: RiteSettings) -> Update:
    """Return one step of the paper's algorithm 1.

    Args:
        grams: ``{r: [2, P_r, 3 r, 3 r]}`` float64, the Grams of ``[X, grad, moment]`` for lora_A and lora_B, both tall.
        moments: the moments after the previous step; zero before the first.
        groups: the values that differ between factors.
        settings: the hyperparameters that all factors share.
    """
    gradients = {r: _unmagnified(both, groups.rows[r], settings) for r, both in grams.items()}
    clip = torch.ones((), dtype=torch.float64, device=next(iter(grams.values())).device)
    if settings.clip_unmagnified_grad > 0:
        norm = torch.stack([_trace(gradient.second).sum() for gradient in gradients.values()]).sum().sqrt()
        clip = torch.where(norm > settings.clip_unmagnified_grad, settings.clip_unmagnified_grad / norm, 1.0)
    update = Update({}, Moments({}, {}), {})
    for r, both in grams.items():
        old = Moments({r: moments.second[r]}, {r: moments.escape[r]})
        _update_one(r, both, gradients[r], clip, old, groups, settings, update)
        update.skipped[r] = (gradients[r].kept == 0).any(dim=0)
    return update


def _unmagnified(grams: Tensor, rows: Tensor, settings: RiteSettings) -> _Gradient:
    r = grams.shape[-1] // 3
    basis = pseudo_inverse_root(grams[..., :r, :r])
    other = basis.flip(0)
    second = symmetric(other @ grams[..., r : 2 * r, r : 2 * r] @ other)
    kept = torch.ones_like(rows)
    if settings.update_skipping > 0:
        limit = settings.update_skipping * settings.update_skipping  # infinite where ** would raise OverflowError
        kept = torch.where(_trace(second) > limit * rows * r, 0.0, 1.0)
        second = torch.where(kept[..., None, None] > 0, second, 0.0)
    return _Gradient(basis, second, kept)


def _update_one(
    r: int,
    grams: Tensor,
    gradient: _Gradient,
    clip: Tensor,
    moments: Moments,
    groups: Groups,
    settings: RiteSettings,
    update: Update,
) -> None:
    """Write the matrices and moments of the pairs of one lora_rank into ``update``."""
    eye = torch.eye(r, dtype=grams.dtype, device=grams.device)
    other = gradient.basis.flip(0)
    rows, lr, weight_decay, beta1, beta2 = (_matrix(values[r]) for values in groups)

    second = symmetric((1 - beta2) * clip**2 * gradient.second / rows + beta2 * moments.second[r])
    escape = groups.beta2[r] * moments.escape[r]
    preconditioner = damped_inverse_root(second + _matrix(escape) * eye, settings.eps)
    # new moment = [X, grad, moment] @ first
    from_gradient = (1 - beta1) * clip * _matrix(gradient.kept) * (other @ preconditioner)
    first = torch.cat([torch.zeros_like(from_gradient), from_gradient, (beta1 * eye).expand_as(from_gradient)], dim=-2)

    capped = torch.ones_like(rows)
    if settings.update_capping > 0:
        rms = _matrix((_trace(first.mT @ grams @ first) / (groups.rows[r] * r)).sqrt())
        capped = 1 / (rms / settings.update_capping).clamp_min(1.0)
    kept_weight = torch.cat([eye, torch.zeros_like(eye), torch.zeros_like(eye)])
    factor = (1 - lr * weight_decay) * kept_weight - lr * capped * (first @ other)
    if settings.balance_param:
        norms = _matrix(_trace(factor.mT @ grams @ factor).sqrt() + 1e-6)
        factor = factor * ((norms * norms.flip(0)).sqrt() / norms)

    # the moments turn into the basis of the new factors, so that the old factors need not be kept
    new_basis = pseudo_inverse_root(symmetric(factor.mT @ grams @ factor))
    turn = (new_basis @ (factor.mT @ grams[..., :r]) @ gradient.basis).flip(0)
    turned = symmetric(turn @ second @ turn.mT)
    if settings.apply_escape:
        escape = escape + _lost(second, turned)
    update.matrices[r] = torch.cat([factor, first @ turn.mT], dim=-1)
    update.moments.second[r], update.moments.escape[r] = turned, escape


def _lost(before: Tensor, after: Tensor) -> Tensor:
    """Return the escaped mass ``[2, P]``: the smaller of the largest loss of an eigenvalue and the trace's loss.

    The eigenvalues make the host wait for a GPU.
    """
    eigenvalue = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).amax(dim=-1)
    return torch.minimum(eigenvalue.clamp_min(0.0), (_trace(before) - _trace(after)).clamp_min(0.0))


def bias_corrected(decay: Tensor, step: Tensor) -> Tensor:
    """Return the decay that makes the average unbiased after ``step`` completed steps.

    Source: Shazeer and Stern, 2018, arXiv 1804.04235, section 7.1.
    """
    return decay * (1 - decay**step) / (1 - decay ** (step + 1))


def _trace(matrix: Tensor) -> Tensor:
    return torch.diagonal(matrix, dim1=-2, dim2=-1).sum(dim=-1)


def _matrix(values: Tensor) -> Tensor:
    return values[..., None, None]
