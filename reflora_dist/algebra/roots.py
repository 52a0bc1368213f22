"""Inverse square roots of Gram matrices: batched, float64, on a GPU without eigenvectors, which wait for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .decompositions import inverted, polar, symmetric

# Singular values of a factor below this times its Frobenius norm count as zero. A Gram squares it, and float64
# resolves 2e-16 of a Gram.
RCOND = 1e-6
_JITTER = 1e-15


def pseudo_inverse_root(gram: Tensor) -> Tensor:
    """The symmetric N with ``N G N`` the projector on the range of G: ``G^(-1/2)`` where G is regular.

    ``X N`` then has orthonormal columns that span those of X, if ``G = X^T X``.

    Args:
        gram: ``[..., r, r]`` float64, symmetric, positive semi-definite.

    Returns:
        ``[..., r, r]`` float64; directions in which X has singular values below ``RCOND |X|_F`` are left out, all of
        them where G is zero or not finite.
    """
    size = torch.diagonal(gram, dim1=-2, dim2=-1).sum(dim=-1)
    usable = torch.isfinite(gram).flatten(-2).all(dim=-1) & (size > 0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scaled = torch.where(usable[..., None, None], gram / size[..., None, None], eye)
    root = _by_eigenvectors(scaled) if gram.device.type == "cpu" else _by_iteration(scaled, eye)
    return torch.where(usable[..., None, None], root * size.rsqrt()[..., None, None], 0.0)


def damped_inverse_root(matrix: Tensor, eps: float) -> Tensor:
    """``(M^(1/2) + eps I)^-1``, zero where M is not finite.

    Args:
        matrix: ``[..., r, r]`` float64, symmetric, positive semi-definite up to rounding.
        eps: above 0.
    """
    finite = torch.isfinite(matrix).flatten(-2).all(dim=-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(finite[..., None, None], matrix, eye)
    damped = _damped_by_eigenvectors if matrix.device.type == "cpu" else _damped_by_iteration
    inverse = damped(matrix, eps, eye)
    return torch.where(finite[..., None, None], symmetric(inverse), 0.0)


def _by_eigenvectors(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    kept = values > RCOND**2
    inverse = torch.where(kept, values.clamp_min(RCOND**2).rsqrt(), 0.0)
    return (vectors * inverse[..., None, :]) @ vectors.mT


def _by_iteration(gram: Tensor, eye: Tensor) -> Tensor:
    """The sign of ``G - RCOND^2 I`` is 1 on the directions to keep, and is its orthogonal polar factor."""
    sign, _ = polar(gram - RCOND**2 * eye)
    projector = 0.5 * (eye + symmetric(sign))
    # Close to the threshold the sign is good to 1e-5 only, which the root of the small directions would magnify. A step
    # P <- 3 P^2 - 2 P^3 (McWeeny, Rev. Mod. Phys. 32, 1960) squares what is missing to a projector.
    square = projector @ projector
    projector = symmetric(square @ (3 * eye - 2 * projector))
    _, inverse_root = _roots(symmetric(projector @ gram @ projector) + (eye - projector))
    return symmetric(projector @ inverse_root @ projector)


def _damped_by_eigenvectors(matrix: Tensor, eps: float, eye: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors / (values.clamp_min(0.0).sqrt() + eps)[..., None, :]) @ vectors.mT


def _damped_by_iteration(matrix: Tensor, eps: float, eye: Tensor) -> Tensor:
    # regular by less than eps can show, also where M is zero
    size = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    root, _ = _roots(matrix + (_JITTER * size + (1e-4 * eps) ** 2) * eye)
    return inverted(root + eps * eye)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a positive definite matrix ``L L^T``: ``L^T = U M^(1/2)``."""
    upper = torch.linalg.cholesky_ex(matrix)[0].mT
    orthogonal, upper_inverse = polar(upper)
    return symmetric(orthogonal.mT @ upper), symmetric(upper_inverse @ orthogonal)
