"""The kernels that solve for S and invert, run by Triton's interpreter and held against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reflora_dist.algebra.decompositions import CONVERGED, NEWTON_STEPS, RELATIVE_PIVOT
from reflora_dist.algebra.refactorization import LARGEST_RESIDUAL, solve_with_torch
from tests.support.kernels import ROUNDING, needs_interpreter
from tests.support.matrices import factor, relative

pytestmark = needs_interpreter


def _solved(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from reflora_dist.algebra.kernels.launch import solve

    return solve(gram_a, gram_b, NEWTON_STEPS, CONVERGED, RELATIVE_PIVOT, LARGEST_RESIDUAL)


def _errors_of_s(lora_rank: int, conditions: list[tuple[float, float]]) -> list[tuple[float, float, bool]]:
    pairs = [
        (factor(3 * lora_rank, lora_rank, cond_a, seed), 1e4 * factor(4 * lora_rank, lora_rank, cond_b, seed + 50))
        for seed, (cond_a, cond_b) in enumerate(conditions)
    ]
    gram_a, gram_b = (torch.stack([pair[side].mT @ pair[side] for pair in pairs]) for side in (0, 1))
    results, expected = _solved(gram_a, gram_b), solve_with_torch(gram_a, gram_b)
    assert expected[2].all()
    return [
        (relative(s, other), relative(s_inv, other_inv), solved)
        for s, other, s_inv, other_inv, solved in zip(
            results[0], expected[0], results[1], expected[1], results[2].tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("lora_rank", [1, 5, 16, 64])
def test_s_is_that_of_torch(interpreted: Any, lora_rank: int) -> None:
    """Both invert the product of the factors, whose condition number takes that many digits of float64 away."""
    conditions = [(1e0, 1e1), (1e2, 1e4)] if lora_rank > 32 else [(1e0, 1e1), (1e2, 1e4), (1e4, 1e4)]
    errors = interpreted(_errors_of_s, lora_rank, conditions)
    for (s, s_inv, solved), (cond_a, cond_b) in zip(errors, conditions, strict=True):
        assert solved and max(s, s_inv) < ROUNDING * cond_a * cond_b


def _pairs_without_s(lora_rank: int) -> tuple[list[bool], list[bool], list[bool], float]:
    good, short = factor(40, lora_rank, 10.0, 0), factor(40, lora_rank, 10.0, 1)
    short[:, 3] = short[:, 2]
    good, short = good.mT @ good, short.mT @ short
    unknown, endless = good.clone(), good.clone()
    unknown[1, 1], endless[-1, -1] = float("nan"), float("inf")
    cases = [torch.zeros_like(good), short, unknown, endless]
    gram_a = torch.stack([good] * len(cases) + cases + [good])
    gram_b = torch.stack(cases + [good] * len(cases) + [2 * good])
    (s, s_inv, solved), expected = _solved(gram_a, gram_b), solve_with_torch(gram_a, gram_b)
    eye = torch.eye(lora_rank, dtype=torch.float64)
    identity = [torch.equal(x, eye) and torch.equal(y, eye) for x, y in zip(s, s_inv, strict=True)]
    return (
        solved.tolist(),
        expected[2].tolist(),
        identity,
        max(relative(s[-1], 2**0.5 * eye), relative(s_inv[-1], 2**-0.5 * eye)),
    )


def test_pairs_without_s_get_the_identity(interpreted: Any) -> None:
    """A factor that is zero, rank-deficient or not finite, on either side; the pair behind them has S = sqrt(2) I."""
    solved, by_torch, identity, error = interpreted(_pairs_without_s, 5)
    assert solved == by_torch == [False] * 8 + [True]
    assert identity == [True] * 8 + [False]
    assert error < ROUNDING * 1e2


def _solved_near_the_least_pivot(lora_rank: int) -> tuple[list[bool], list[bool]]:
    grams = []
    for ratio in (0.9, 1.1):
        gram = torch.eye(lora_rank, dtype=torch.float64)
        gram[0, 1] = gram[1, 0] = 1 - ratio * RELATIVE_PIVOT / 2  # which leaves the second pivot 1 - gram[0, 1]^2
        grams.append(gram)
    good = factor(40, lora_rank, 10.0, 0)
    grams.append(good.mT @ good)
    gram_a, gram_b = (torch.stack([grams[i] for i in of_side]) for of_side in ((0, 0, 1, 1, 1, 2), (0, 1, 0, 1, 2, 1)))
    return _solved(gram_a, gram_b)[2].tolist(), solve_with_torch(gram_a, gram_b)[2].tolist()


def test_least_pivot_and_largest_residual_are_those_of_torch(interpreted: Any) -> None:
    """Of either factor. The first four S are near the identity and would do; the fifth misses its equation by 1e-4."""
    solved, by_torch = interpreted(_solved_near_the_least_pivot, 5)
    assert solved == by_torch == [False, False, False, True, False, True]


def _inverse_errors(lora_rank: int) -> tuple[list[float], bool, list[list[bool]]]:
    from reflora_dist.algebra.kernels.launch import invert

    conditions = (1e0, 1e4, 1e8) if lora_rank < 64 else (1e6,)
    matrices = torch.stack([factor(lora_rank, lora_rank, cond, 0) for cond in conditions])
    matrices = torch.stack([matrices, matrices.mT])
    expected = torch.linalg.inv(matrices)
    inverses = invert(matrices)
    errors = [relative(inverses[:, place], expected[:, place]) / cond for place, cond in enumerate(conditions)]
    order = torch.eye(lora_rank, dtype=torch.float64)[torch.randperm(lora_rank)]
    exact = torch.equal(invert(order), order.mT)
    matrices[0, -1, 0, 0] = float("nan")
    matrices[1, -1] = 0.0
    finite = invert(matrices).isfinite().flatten(2).all(-1)
    return errors, exact, finite.tolist()


@pytest.mark.parametrize("lora_rank", [1, 5, 16, 24, 128])
def test_inverses_are_those_of_torch(interpreted: Any, lora_rank: int) -> None:
    """As far as the condition number lets two eliminations agree; a permutation, which is all pivoting, is exact."""
    errors, exact, finite = interpreted(_inverse_errors, lora_rank)
    assert max(errors) < 1e-14 * lora_rank
    assert exact
    assert finite == [[True] * (len(errors) - 1) + [False]] * 2  # where one is NaN, and where all are zero
