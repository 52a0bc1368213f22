"""The matrix roots that LoRA-RITE stands on: by eigenvectors on a CPU, by iteration on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflora_dist.algebra import decompositions, roots
from tests.support.matrices import factor, positive_definite, relative

EXAMPLES = settings(max_examples=40, deadline=None)


def _both_paths(gram: Tensor) -> tuple[Tensor, Tensor]:
    """What pseudo_inverse_root makes of a Gram on a CPU and on a GPU."""
    size = gram.trace()
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    scaled = (gram / size)[None]
    by_eigenvectors, by_iteration = roots._by_eigenvectors(scaled), roots._by_iteration(scaled, eye)
    return by_eigenvectors[0] * size.rsqrt(), by_iteration[0] * size.rsqrt()


@EXAMPLES
@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**31), st.floats(0, 4), st.floats(-6, 6))
def test_inverse_roots_agree(r: int, more: int, seed: int, log_condition: float, log_scale: float) -> None:
    """Eigenvectors and iteration, over conditions up to 1e4: X N is orthonormal by both."""
    tall = 10**log_scale * factor(r + more, r, 10**log_condition, seed)
    gram = tall.mT @ tall
    eye = torch.eye(r, dtype=torch.float64)
    rounding = 1e-14 * 10 ** (2 * log_condition) * r
    for root in (*_both_paths(gram), roots.pseudo_inverse_root(gram)):
        assert relative(root @ gram @ root, eye) < max(1e-11, rounding)
    assert relative(*_both_paths(gram)) < max(1e-10, rounding)


def test_iterations_take_several_leading_dimensions() -> None:
    """As LoRA-RITE gives them: both factors of every pair."""
    torch.manual_seed(0)
    tall = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    gram, eye = tall.mT @ tall, torch.eye(4, dtype=torch.float64)
    gram /= gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    assert relative(roots._by_iteration(gram, eye), roots._by_eigenvectors(gram)) < 1e-10
    damped = roots._damped_by_eigenvectors(gram, 1e-3, eye)
    assert relative(roots._damped_by_iteration(gram, 1e-3, eye), damped) < 1e-8


@pytest.mark.parametrize("condition", [1e5, 10**5.5])
def test_inverse_roots_near_the_threshold(condition: float) -> None:
    """Directions that still count are found by both ways, to what the Gram's rounding leaves of them."""
    tall = factor(40, 6, condition, 0)
    gram = tall.mT @ tall
    for root in _both_paths(gram):
        assert relative(root @ gram @ root, torch.eye(6, dtype=torch.float64)) < 1e-15 * condition**2 * 100


@pytest.mark.parametrize("lora_rank", [16, 64])
@pytest.mark.parametrize("smallest", [10**-5.5, 10**-5.95, 1e-8])
def test_what_counts_is_split_from_what_does_not(
    lora_rank: int, smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular values on both sides of the threshold and close to it, in as many steps as on a GPU: N G N is a
    projector, to what is left of an eigenvalue of 1e-12 in a Gram that is good to 1e-16."""
    monkeypatch.setattr(decompositions, "NEARLY_ORTHOGONAL", -1.0)
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(lora_rank, lora_rank, dtype=torch.float64))
    values = torch.logspace(0, math.log10(smallest), lora_rank, dtype=torch.float64)
    gram = (basis * values.square()) @ basis.mT
    for root in _both_paths(gram):
        projector = root @ gram @ root
        assert torch.linalg.matrix_norm(projector @ projector - projector) < 1e-3


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_inverse_roots_of_a_deficient_factor(rank: int) -> None:
    """X N projects on the directions there are, by both ways."""
    tall = factor(40, 6, 3.0, 0) @ torch.diag(torch.tensor([1.0] * rank + [0.0] * (6 - rank)).double())
    tall = tall @ torch.linalg.qr(factor(6, 6, 2.0, 1)).Q
    gram = tall.mT @ tall
    onto = tall @ torch.linalg.pinv(tall)
    for root in _both_paths(gram):
        assert relative(tall @ root @ root @ tall.mT, onto) < 1e-8
        assert torch.linalg.matrix_rank(root, rtol=1e-8) == rank


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_inverse_roots_where_there_are_none(value: float) -> None:
    """Zero comes out, and the neighbour in the batch is not disturbed."""
    tall = factor(20, 4, 3.0, 0)
    fine = tall.mT @ tall
    gram = torch.stack([fine, value * torch.ones_like(fine)])
    root = roots.pseudo_inverse_root(gram)
    assert not root[1].any() and torch.equal(root[0], roots.pseudo_inverse_root(fine[None])[0])
    damped = roots.damped_inverse_root(gram, 1e-6)
    assert damped[0].isfinite().all()
    assert torch.equal(damped[1], torch.eye(4).double() * 1e6) if value == 0.0 else not damped[1].any()


@EXAMPLES
@given(st.integers(1, 16), st.integers(0, 2**31), st.floats(0, 10), st.floats(-8, 2))
def test_damped_inverse_roots_agree(r: int, seed: int, log_condition: float, log_scale: float) -> None:
    """``(M^(1/2) + eps)^-1`` by both ways, also where M is nearly singular."""
    matrix, eps = positive_definite(r, 10**log_condition, seed, 10**log_scale), 1e-6
    eye = torch.eye(r, dtype=torch.float64)
    by_iteration = roots._damped_by_iteration(matrix[None], eps, eye)[0]
    exact = roots.damped_inverse_root(matrix[None], eps)[0]
    values, vectors = torch.linalg.eigh(matrix)
    assert relative(exact, (vectors / (values.clamp_min(0).sqrt() + eps)) @ vectors.mT) < 1e-8
    assert relative(by_iteration, exact) < 1e-4
