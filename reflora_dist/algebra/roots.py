"""Inverse square roots of Gram matrices, batched, in float64.

GPUs compute them without eigenvectors: an eigendecomposition would make a GPU wait for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decompositions import inverted, polar, symmetric

# A singular value of a factor counts as zero if it is below RCOND times the factor's Frobenius norm. In the Gram matrix
# the threshold is RCOND^2, well above the 2e-16 that float64 resolves.
RCOND = 1e-6
_JITTER = 1e-15


def pseudo_inverse_root(gram: Tensor) -> Tensor:
    """Return the symmetric N for which ``N G N`` is the projector on the range of G: ``G^(-1/2)`` if G is regular.

    If ``G = X^T X`` is regular, ``X N`` has orthonormal columns with the span of X's.

    Args:
        gram: ``[..., r, r]`` float64, symmetric, positive semi-definite.

    Returns:
        N ``[..., r, r]`` float64. It is zero in directions where X has singular values below ``RCOND |X|_F``, and
        zero altogether if G is zero or not finite.
    """
    size = torch.diagonal(gram, dim1=-2, dim2=-1).sum(dim=-1)
    usable = torch.isfinite(gram).flatten(-2).all(dim=-1) & (size > 0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scaled = torch.where(usable[..., None, None], gram / size[..., None, None], eye)
    root = _by_eigenvectors(scaled) if gram.device.type == "cpu" else _by_iteration(scaled, eye)
    return torch.where(usable[..., None, None], root * size.rsqrt()[..., None, None], 0.0)


def damped_inverse_root(matrix: Tensor, eps: float) -> Tensor:
    """Return ``(M^(1/2) + eps I)^-1``, or zero if M is not finite.

    Args:
        matrix: M ``[..., r, r]`` float64, symmetric, positive semi-definite up to rounding.
        eps: a number above 0.

    Returns:
        ``[..., r, r]`` float64, symmetric.
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
    """Find the directions to keep by the matrix sign of ``G - RCOND^2 I``, which is its orthogonal polar factor.

    The sign is 1 on these directions and -1 on the others.
    """
    sign, _ = polar(gram - RCOND**2 * eye)
    projector = 0.5 * (eye + symmetric(sign))
    # Close to the threshold the sign is accurate to 1e-5 only, and the inverse root of small directions would magnify
    # the error. A step P <- 3 P^2 - 2 P^3 (McWeeny, Rev. Mod. Phys. 32, 1960) squares the distance to a projector.
    square = projector @ projector
    projector = symmetric(square @ (3 * eye - 2 * projector))
    _, inverse_root = _roots(symmetric(projector @ gram @ projector) + (eye - projector))
    return symmetric(projector @ inverse_root @ projector)


def _damped_by_eigenvectors(matrix: Tensor, eps: float, eye: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors / (values.clamp_min(0.0).sqrt() + eps)[..., None, :]) @ vectors.mT


def _damped_by_iteration(matrix: Tensor, eps: float, eye: Tensor) -> Tensor:
    # The shift makes M regular, even where it is zero. It is too small to show beside eps.
    size = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    root, _ = _roots(matrix + (_JITTER * size + (1e-4 * eps) ** 2) * eye)
    return inverted(root + eps * eye)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root and the inverse square root of a positive definite ``M = L L^T``.

    ``L^T = U M^(1/2)`` is the polar decomposition of ``L^T``.
    """
    upper = torch.linalg.cholesky_ex(matrix)[0].mT
    orthogonal, upper_inverse = polar(upper)
    return symmetric(orthogonal.mT @ upper), symmetric(upper_inverse @ orthogonal)
