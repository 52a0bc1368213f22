"""LoRA-Muon as an optimizer: its formula, the size of its steps, invariance, B = 0, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reflora_dist import LoRAMuon, RefLoRAConfig, attach
from reflora_dist.algebra import roots
from reflora_dist.engines.pairs import find_pairs
from tests.support.oracles import MuonOracle, factors_in_pairs, scalings_of
from tests.support.small import (
    backward,
    mixed,
    muon,
    own_optimizer,
    product_distance,
    products,
    small_batches,
    small_model,
    train_small,
    trainable,
)
from tests.support.workloads import Factors, named_factors, worst_factor_error

LR = 0.02
# float64; a Gram matrix squares a condition number, which is up to 1e4 here
TOLERANCE = 1e-7

# each acts on the small network, which test_every_option_matters holds them to
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no momentum": {"momentum": 0.0},
    "momentum": {"momentum": 0.7},
    "weight decay": {"weight_decay": 0.5},
}


def _oracle(model: nn.Module, **options: Any) -> MuonOracle:
    return MuonOracle(factors_in_pairs(model), scalings_of(model), **{"lr": LR, **options})


@pytest.mark.parametrize("from_zero", [False, True], ids=["random", "B=0"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_follows_the_formula(options: dict[str, Any], from_zero: bool) -> None:
    """Eight steps end where the published formula ends by singular value decompositions of whole factors."""
    ends, handle = [], None
    for make in (muon, _oracle):
        model = small_model(from_zero=from_zero)
        optimizer = make(model, **options)
        if make is muon:
            optimizer, handle = optimizer
        ends.append((optimizer, train_small(model, optimizer, small_batches(8))))
    (_, factors), (oracle, expected) = ends
    assert worst_factor_error(factors, expected) < TOLERANCE
    report = handle.report()
    assert report.skipped_pairs == oracle.skipped_pairs == (2 if from_zero else 0)
    assert report.applied_steps == report.steps == 8


def test_a_gpus_iterations_follow_the_formula_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes no eigenvectors; from B = 0, where a moment and a factor are zero."""

    def by_iteration(gram: Tensor) -> Tensor:
        calls.append(gram.shape)
        return roots._by_iteration(gram, torch.eye(gram.shape[-1], dtype=gram.dtype))

    calls: list[Any] = []
    monkeypatch.setattr(roots, "_by_eigenvectors", by_iteration)
    ends = []
    for make in (lambda model: muon(model)[0], _oracle):
        model = small_model(from_zero=True)
        ends.append(train_small(model, make(model), small_batches(8)))
    assert worst_factor_error(*ends) < TOLERANCE
    assert len(calls) == 2 * 8


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "defaults"])
def test_every_option_matters(name: str) -> None:
    ends = []
    for options in ({}, OPTIONS[name]):
        model = small_model()
        ends.append(train_small(model, _oracle(model, **options), small_batches(8)))
    assert worst_factor_error(*ends) > 1e-3


# --- the size of a step ---


def _parts(model: nn.Module, before: Factors) -> list[tuple[Tensor, Tensor]]:
    """``s B (A' - A)`` and ``s (B' - B) A`` of every pair, with A and B before a step and A' and B' after it."""
    old = list(before.values())
    return [
        (pair.scaling * b @ (pair.lora_a.detach() - a), pair.scaling * (pair.lora_b.detach() - b) @ a)
        for pair, a, b in zip(find_pairs(model), old[0::2], old[1::2], strict=True)
    ]


@pytest.mark.parametrize("alpha", [6, 48])
@pytest.mark.parametrize("lora_rank", [2, 5])
def test_the_learning_rate_is_the_norm_of_a_step(alpha: int, lora_rank: int) -> None:
    """Each factor changes the product by a matrix whose r singular values are all lr / 2, for every r and alpha."""
    model = small_model(r=lora_rank, lora_alpha=alpha)
    optimizer, _ = muon(model)
    before = {name: factor.detach().clone() for name, factor in named_factors(model).items()}
    train_small(model, optimizer, small_batches(1))
    for parts in _parts(model, before):
        for part in parts:
            values = torch.linalg.svdvals(part)
            torch.testing.assert_close(values[:lora_rank], torch.full_like(values[:lora_rank], LR / 2))
            assert float(values[lora_rank]) < 1e-12


def test_at_b_equal_to_zero_only_b_moves() -> None:
    """lora_B takes its whole step. lora_A, whose step does not exist there, moves from the second step on."""
    model = small_model(from_zero=True)
    optimizer, handle = muon(model)
    before = {name: factor.detach().clone() for name, factor in named_factors(model).items()}
    after = train_small(model, optimizer, small_batches(1))
    assert all(torch.equal(after[name], before[name]) == ("lora_A" in name) for name in before)
    for _, of_b in _parts(model, before):
        torch.testing.assert_close(torch.linalg.matrix_norm(of_b, 2), torch.tensor(LR / 2, dtype=torch.float64))
    assert handle.report().skipped_pairs == 2
    later = train_small(model, optimizer, small_batches(1))
    assert not any(torch.equal(after[name], later[name]) for name in before)
    assert handle.report().skipped_pairs == 2


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_a_pair_of_less_than_full_rank_is_counted_and_stays_finite(side: str) -> None:
    """The other factor takes its step in the directions that exist."""
    ends = []
    for make in (lambda model: muon(model)[0], _oracle):
        model = small_model()
        with torch.no_grad():
            factor = next(f for name, f in named_factors(model).items() if side in name and "first" in name)
            tall = factor.mT if side == "lora_A" else factor
            tall[:, 0] = 2 * tall[:, 1]
        ends.append(train_small(model, make(model), small_batches(1)))
    assert worst_factor_error(*ends) < TOLERANCE
    model = small_model()
    with torch.no_grad():
        named_factors(model)[next(n for n in named_factors(model) if "first" in n and side in n)].zero_()
    optimizer, handle = muon(model)
    train_small(model, optimizer, small_batches(1))
    assert handle.report().skipped_pairs == 1


# --- invariance ---


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "momentum": 0.5}])
@pytest.mark.parametrize("condition", [1.0, 30.0])
@pytest.mark.parametrize("steps", [1, 6])
def test_the_product_does_not_depend_on_the_factors(condition: float, options: dict[str, Any], steps: int) -> None:
    """From (M A, B M^-1) the first step gives the same product, and so does a whole training."""
    apart, moved = product_distance(lambda model: muon(model, **options)[0], condition, steps)
    assert moved > 1e-3 and apart < 1e-6 * moved


def test_under_muon_of_each_factor_the_product_depends_on_the_factors() -> None:
    """The roots R are needed: without them the start of the factors shows."""

    class EachFactor(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    left, _, right = torch.linalg.svd(parameter.grad, full_matrices=False)
                    parameter.grad.copy_(left @ right)
            super().step()

    apart, moved = product_distance(lambda model: EachFactor(trainable(model), lr=LR), 1.0, 1)
    assert apart > 1e-2 * moved


def test_alpha_does_not_matter() -> None:
    """The same product from another alpha, with lora_B to match, takes the same way."""
    ends = []
    for alpha in (6, 24):
        model = small_model(lora_alpha=alpha)
        with torch.no_grad():
            for name, factor in named_factors(model).items():
                if "lora_B" in name:
                    factor.mul_(6 / alpha)
        train_small(model, muon(model)[0], small_batches(4))
        ends.append(products(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --- gradients, groups, values ---


def test_groups_of_their_own_settings() -> None:
    """lora_A and lora_B at rates, decays and momenta of their own; a scheduler's change is followed."""
    sides = [
        {"lr": 0.004, "weight_decay": 0.3, "momentum": 0.5},
        {"lr": 0.05, "weight_decay": 0.0, "momentum": 0.9},
    ]
    model = small_model()
    factors = factors_in_pairs(model)
    optimizer = LoRAMuon([{"params": factors[i::2], **sides[i]} for i in (0, 1)])
    attach(model, optimizer, RefLoRAConfig(method="lora-muon"))

    def halve(groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["lr"] = group["lr"] / 2

    trained = train_small(model, optimizer, small_batches(4), lambda: halve(optimizer.param_groups))
    model = small_model()
    factors = factors_in_pairs(model)
    oracle = _oracle(model)
    taken = [dict(sides[number % 2]) for number in range(len(factors))]
    oracle.groups = taken
    expected = train_small(model, oracle, small_batches(4), lambda: halve(taken))
    assert worst_factor_error(trained, expected) < TOLERANCE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(value: float) -> None:
    """As with AdamW it makes its pair not finite, and no other."""
    model = small_model()
    optimizer, _ = muon(model)
    backward(model, small_batches(1)[0])
    parameters = named_factors(model)
    bad = next(name for name in parameters if "first" in name and "lora_A" in name)
    parameters[bad].grad[0, 0] = value
    optimizer.step()
    for name, factor in parameters.items():
        assert bool(factor.isfinite().any()) == ("second" in name), name


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"lr": float("inf")},
        {"momentum": 1.0},
        {"momentum": "x"},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"weight_decay": 500.0, "lr": 2e-3},
    ],
)
def test_values_are_checked(settings: dict[str, Any]) -> None:
    """Also those of a group."""
    name = next(iter(settings))
    parameter = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=f"{name}="):
        LoRAMuon([parameter], **settings)
    with pytest.raises(ValueError, match=f"{name}="):
        LoRAMuon([{"params": [parameter], **settings}])


def test_a_rate_that_a_schedule_makes_too_large_is_refused() -> None:
    model = small_model()
    optimizer, _ = muon(model, weight_decay=1.0)
    optimizer.param_groups[0]["lr"] = 1.5
    backward(model, small_batches(1)[0])
    with pytest.raises(ValueError, match=r"weight_decay=1.0 with lr=1.5: .* must be below 1"):
        optimizer.step()


def test_a_scaling_that_changes_is_refused() -> None:
    model = small_model()
    optimizer, _ = muon(model)
    model.base_model.model.first.set_scale("default", 2.0)
    backward(model, small_batches(1)[0])
    with pytest.raises(RuntimeError, match="scaling changed after attach"):
        optimizer.step()


# --- state ---


def test_factors_have_no_second_moment() -> None:
    model = small_model()
    optimizer, _ = muon(model)
    train_small(model, optimizer, small_batches(3))
    for parameter, state in optimizer.state.items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == parameter.shape and state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


@pytest.mark.parametrize("other", ["adamw", "lora-rite"])
def test_the_state_of_another_optimizer_is_refused(other: str) -> None:
    model = small_model()
    if other == "adamw":
        optimizer = torch.optim.AdamW(trainable(model), lr=LR)
    else:
        optimizer, _ = own_optimizer(other, model)
    train_small(model, optimizer, small_batches(1))
    mine = LoRAMuon(trainable(model), lr=LR)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["momentum"] = 0.9
    mine.load_state_dict(state)
    with pytest.raises(ValueError, match=r"that of another optimizer .* start LoRAMuon without it"):
        attach(model, mine, RefLoRAConfig(method="lora-muon"))


def test_mixed_starts_have_the_same_product() -> None:
    """What the invariance is tested with."""
    for one, other in zip(products(small_model()), products(mixed(small_model(), 30.0)), strict=True):
        torch.testing.assert_close(one, other)
