"""The mathematics of S, against its definition and against the plain reference, over shapes and conditioning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reflora_dist import RefLoRAConfig
from reflora_dist.algebra.refactorization import solve_refactorization, solve_scale
from reflora_dist.methods.reference import ReferenceRefLoRA, refactored, refactorization
from tests.support.matrices import factor, relative

SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def pairs(draw, max_log_cond_a: float = 2.0, max_log_cond_b: float = 4.0):
    """``(lora_A, lora_B, lora_rank)`` of full rank."""
    lora_rank = draw(st.integers(1, 24))
    in_features, out_features = (draw(st.integers(lora_rank, lora_rank + 80)) for _ in range(2))
    cond_a, cond_b = (10 ** draw(st.floats(0, top)) for top in (max_log_cond_a, max_log_cond_b))
    seed = draw(st.integers(0, 2**31))
    scale = 10 ** draw(st.floats(-6, 6))
    return scale * factor(in_features, lora_rank, cond_a, seed).mT, factor(out_features, lora_rank, cond_b, seed + 1)


def solve(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    s, s_inv, solved = solve_refactorization((lora_a @ lora_a.mT)[None], (lora_b.mT @ lora_b)[None])
    return s[0], s_inv[0], bool(solved[0])


@SETTINGS
@given(pairs())
def test_s_solves_its_equation(pair) -> None:
    """S G_A S = G_B, S is symmetric positive definite, and S_inv is its inverse."""
    lora_a, lora_b = pair
    s, s_inv, solved = solve(lora_a, lora_b)
    assert solved
    gram_b = lora_b.mT @ lora_b
    assert relative(s @ (lora_a @ lora_a.mT) @ s, gram_b) < 1e-9
    assert torch.equal(s, s.mT) and torch.linalg.eigvalsh(s)[0] > 0
    assert relative(s @ s_inv, torch.eye(s.shape[0], dtype=s.dtype)) < 1e-6


@SETTINGS
@given(pairs())
def test_s_agrees_with_the_reference(pair) -> None:
    """The batched solution from Gram matrices equals the one from QR factorizations of the factors."""
    lora_a, lora_b = pair
    s, s_inv, _ = solve(lora_a, lora_b)
    expected = refactorization(lora_a, lora_b)
    assert expected is not None
    assert relative(s, expected[0]) < 1e-7
    assert relative(s_inv, expected[1]) < 1e-7


@SETTINGS
@given(pairs(max_log_cond_b=2.0))
def test_refactored_factors_are_balanced(pair) -> None:
    """The factors that S stands for, (S^1/2 A, B S^-1/2), have equal Grams and the same product."""
    lora_a, lora_b = pair
    s, _, _ = solve(lora_a, lora_b)
    values, vectors = torch.linalg.eigh(s)
    root, inverse_root = (vectors * values**power @ vectors.mT for power in (0.5, -0.5))
    balanced_a, balanced_b = root @ lora_a, lora_b @ inverse_root
    assert relative(balanced_a @ balanced_a.mT, balanced_b.mT @ balanced_b) < 1e-7
    assert relative(balanced_b @ balanced_a, lora_b @ lora_a) < 1e-9


@settings(max_examples=15, deadline=None)
@given(pairs(max_log_cond_a=1.0, max_log_cond_b=1.0), st.integers(0, 2**31))
def test_products_do_not_depend_on_the_starting_factorization(pair, seed) -> None:
    """Under SGD the trajectory of B A is the same from (A, B) and from (M A, B M^-1); plain LoRA's is not."""
    lora_a, lora_b = pair
    lora_rank = lora_a.shape[0]
    mix = factor(lora_rank, lora_rank, 8.0, seed)
    target = torch.randn(lora_b.shape[0], lora_a.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    lora_a = lora_a / torch.linalg.matrix_norm(lora_a, 2)

    def train(a: torch.Tensor, b: torch.Tensor, method: str) -> torch.Tensor:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        optimizer = torch.optim.SGD([a, b], lr=0.02)
        ReferenceRefLoRA([(a, b)], optimizer, RefLoRAConfig(method=method, warmup_steps=0))
        for _ in range(5):
            optimizer.zero_grad()
            (0.5 * (b @ a - target).square().sum() / target.square().sum()).backward()
            optimizer.step()
        return (b @ a).detach()

    other = (mix @ lora_a, lora_b @ torch.linalg.inv(mix))
    start = lora_b @ lora_a
    moved = relative(train(lora_a, lora_b, "reflora"), start)
    assume(moved > 1e-6)
    assert relative(train(*other, "reflora"), train(lora_a, lora_b, "reflora")) < 1e-8 + 1e-6 * moved
    if lora_rank > 1:
        assert relative(train(*other, "lora"), train(lora_a, lora_b, "lora")) > 1e-6 * moved


@pytest.mark.parametrize("case", ["B = 0", "dead row of A", "dead column of B", "r > in", "r > out", "nan", "inf"])
def test_where_s_does_not_exist_the_pair_is_left_alone(case: str) -> None:
    """A pair without S gets the identity and is told apart; its neighbour in the batch is not disturbed."""
    lora_a, lora_b = factor(40, 8, 3.0, 0).mT.clone(), factor(30, 8, 3.0, 1)
    good = (lora_a @ lora_a.mT, lora_b.mT @ lora_b)
    match case:
        case "B = 0":
            lora_b = torch.zeros_like(lora_b)
        case "dead row of A":
            lora_a[3] = 0
        case "dead column of B":
            lora_b = lora_b.clone()
            lora_b[:, 7] = lora_b[:, 2]
        case "r > in":
            lora_a = factor(8, 8, 3.0, 0).mT[:, :5]
        case "r > out":
            lora_b = factor(8, 8, 3.0, 0)[:5]
        case _:
            lora_b = lora_b * float(case)
    grams = [torch.stack([bad, fine]) for bad, fine in zip((lora_a @ lora_a.mT, lora_b.mT @ lora_b), good, strict=True)]
    s, s_inv, solved = solve_refactorization(*grams)
    eye = torch.eye(8, dtype=torch.float64)
    assert solved.tolist() == [False, True]
    assert torch.equal(s[0], eye) and torch.equal(s_inv[0], eye)
    assert relative(s[1] @ good[0] @ s[1], good[1]) < 1e-12


@pytest.mark.parametrize(
    ("cond_a", "cond_b", "bound"),
    [(1e2, 1e4, 1e-7), (1e4, 1e4, 1e-7), (1e2, 1e5, 1e-5), (1e4, 1e6, 1e-2)],
)
def test_accuracy_by_condition_number(cond_a: float, cond_b: float, bound: float) -> None:
    """What is lost beyond the promised range: forming the Gram rounds by eps cond(B)^2, the solution adds nothing."""
    for seed in range(5):
        lora_a, lora_b = factor(96, 8, cond_a, seed).mT, factor(64, 8, cond_b, seed + 100)
        s, s_inv, solved = solve(lora_a, lora_b)
        expected = refactorization(lora_a, lora_b)
        assert solved and expected is not None
        assert max(relative(s, expected[0]), relative(s_inv, expected[1])) < bound


def test_beyond_float64_a_pair_is_skipped_not_spoilt() -> None:
    """cond(B) = 1e9 cannot be seen in a float64 Gram: that is told, and nothing but the identity comes out."""
    s, s_inv, solved = solve(factor(64, 8, 10.0, 0).mT, factor(64, 8, 1e9, 1))
    assert not solved
    assert torch.equal(s, torch.eye(8, dtype=s.dtype)) and torch.equal(s_inv, s)


def test_scale_balances_norms() -> None:
    """RefLoRA-S: s = |B| / |A|; zero and non-finite factors are left alone."""
    a = torch.tensor([4.0, 0.0, 1.0, torch.nan], dtype=torch.float64)
    b = torch.tensor([9.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    s, solved = solve_scale(a, b)
    assert solved.tolist() == [True, False, False, False]
    assert s.tolist() == [1.5, 1.0, 1.0, 1.0]


def test_reference_leaves_a_singular_pair_alone() -> None:
    lora_a, grad = factor(10, 4, 2.0, 0).mT, torch.ones(4, 10)
    grad_a, _ = refactored(lora_a, torch.zeros(6, 4), grad, torch.ones(6, 4))
    assert torch.equal(grad_a, grad.double())
