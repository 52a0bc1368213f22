"""LoRA-RITE as an optimizer: every option against its oracle, invariance, the other parameters, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reflora_dist import LoRARite, RefLoRAConfig, attach
from reflora_dist.step.factor_optimizer import FactorOptimizer
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.oracles import RiteOracle, factors_in_pairs, train_oracle
from tests.support.small import (
    backward,
    own_optimizer,
    product_distance,
    rite,
    small_batches,
    small_model,
    train_small,
    trainable,
)
from tests.support.workloads import (
    FACTOR_TOLERANCE,
    LOSS_TOLERANCE,
    Factors,
    build_model,
    load_reference,
    named_factors,
    worst_factor_error,
    worst_loss_error,
)

CONFIG = RefLoRAConfig(method="lora-rite")
# float64; a second moment's eigenvalue rounds by 1e-16 of the largest, and its root is taken
TOLERANCE = 1e-7

# the values make each option act on the small network, which test_every_option_matters holds them to
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no clipping": {"clip_unmagnified_grad": 0.0},
    "clipping": {"clip_unmagnified_grad": 0.02},
    "capping": {"update_capping": 0.3},
    "skipping": {"update_skipping": 0.004},
    "weight decay": {"weight_decay": 0.5},
    "escape": {"apply_escape": True},
    "balance": {"balance_param": True},
    "eps": {"eps": 1e-2},
    "betas": {"betas": (0.5, 0.9)},
    "everything": {
        "clip_unmagnified_grad": 0.1,
        "update_capping": 0.5,
        "weight_decay": 0.1,
        "apply_escape": True,
        "balance_param": True,
    },
}


def _worst_error(factors: Factors, expected: Factors) -> float:
    """`worst_factor_error` that bears a factor of zeros."""
    return max(float((factors[n] - e).norm() / e.norm().clamp_min(1e-12)) for n, e in expected.items())


def test_the_oracle_follows_the_published_code() -> None:
    """The oracle, in float64, ends where the published fp32 code does: what is held against it is held against that."""
    reference = load_reference()
    settings = reference.settings_of("lora-rite")
    losses, factors = train_oracle(build_model(reference, dtype=torch.float64), reference.batches, settings, CONFIG)
    assert worst_factor_error(factors, reference.factors["lora-rite"]) < FACTOR_TOLERANCE / 10  # measured 7e-7
    assert worst_loss_error(losses, reference.cases["lora-rite"]["losses"]) < LOSS_TOLERANCE


@pytest.mark.parametrize("from_zero", [False, True], ids=["random", "B=0"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_follows_the_oracle(options: dict[str, Any], from_zero: bool) -> None:
    """Eight steps from random factors and from PEFT's B = 0 end where QR factorizations end."""
    model = small_model(from_zero=from_zero)
    optimizer, handle = rite(model, **options)
    factors = train_small(model, optimizer, small_batches(8))
    model = small_model(from_zero=from_zero)
    oracle = RiteOracle(factors_in_pairs(model), **{"lr": 0.02, **options})
    expected = train_small(model, oracle, small_batches(8))
    assert _worst_error(factors, expected) < TOLERANCE
    assert handle.report().skipped_pairs == oracle.skipped_pairs
    assert handle.report().applied_steps == handle.report().steps == 8


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("defaults", "no clipping")])
def test_every_option_matters(name: str) -> None:
    """The oracle's own trajectory changes with each option, so the comparison above is one."""
    ends = []
    for options in ({}, OPTIONS[name]):
        model = small_model()
        ends.append(train_small(model, RiteOracle(factors_in_pairs(model), lr=0.02, **options), small_batches(8)))
    assert worst_factor_error(*ends) > 1e-3


def test_a_gradient_that_is_too_large_is_skipped_and_counted() -> None:
    """Of a pair whose unmagnified gradients are all above the threshold nothing moves, and both moments stay zero."""
    model = small_model()
    before = copy.deepcopy(dict(named_factors(model)))
    optimizer, handle = rite(model, update_skipping=1e-9)
    after = train_small(model, optimizer, small_batches(3))
    assert handle.report().skipped_pairs == 2 * 3
    assert worst_factor_error(after, {name: f.detach() for name, f in before.items()}) < 1e-15
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())


@pytest.mark.parametrize(("slack", "skipped"), [(1.001, 0), (0.999, 1)])
def test_the_threshold_of_skipping(slack: float, skipped: int) -> None:
    """It is the root mean square of the unmagnified gradient, here of the one that is largest."""
    model = small_model()
    backward(model, small_batches(1)[0])
    factors, sizes = factors_in_pairs(model), []
    for lora_a, lora_b in zip(factors[0::2], factors[1::2], strict=True):
        pairs = ((lora_a.grad.mT, lora_b.detach()), (lora_b.grad, lora_a.detach().mT))
        unmagnified = [grad @ torch.linalg.pinv(torch.linalg.qr(other).R) for grad, other in pairs]
        sizes += [float(gradient.square().mean().sqrt()) for gradient in unmagnified]
    optimizer, handle = rite(model, update_skipping=slack * max(sizes))
    optimizer.step()
    assert handle.report().skipped_pairs == skipped


# --- invariance ---


@pytest.mark.parametrize("options", [{}, {"apply_escape": True, "update_capping": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize("condition", [1.0, 30.0])
def test_the_product_does_not_depend_on_the_factors(condition: float, options: dict[str, Any]) -> None:
    """Rotated, rescaled or mixed by any invertible M, the trajectory of B A is the same over a whole training."""
    apart, moved = product_distance(lambda model: rite(model, **options)[0], condition)
    assert moved > 1e-2 and apart < 1e-6 * moved


def test_under_adamw_the_product_depends_on_the_factors() -> None:
    apart, moved = product_distance(lambda model: torch.optim.AdamW(trainable(model), lr=0.02), 1.0)
    assert apart > 1e-2 * moved


def test_balanced_factors_have_equal_norms() -> None:
    model = small_model()
    train_small(model, rite(model, balance_param=True)[0], small_batches(2))
    factors = [factor.detach() for factor in factors_in_pairs(model)]
    for lora_a, lora_b in zip(factors[0::2], factors[1::2], strict=True):
        assert abs(float(lora_a.norm() / lora_b.norm()) - 1) < 1e-5


# --- parameters that are no factors, and groups ---


def _with_others() -> nn.Module:
    """A head that is trained whole, and a norm made trainable."""
    model = small_model(modules_to_save=["head"])
    for name, parameter in model.named_parameters():
        if ".norm." in name:
            parameter.requires_grad_(True)
    return model


class _Fixed:
    """Gradients that do not depend on the factors, so that what happens to them cannot show elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(5)
        self._parameters = trainable(model)
        self._gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in self._parameters]

    def set(self, step: int) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient * (1 + step)


@pytest.mark.parametrize("own", METHOD_OPTIMIZERS.values(), ids=METHOD_OPTIMIZERS)
def test_other_parameters_follow_adamw_exactly(own: type[FactorOptimizer]) -> None:
    """A whole head and a norm's weights are bit-equal to torch's AdamW with the same settings."""
    ends = []
    for make in (own, torch.optim.AdamW):
        model = _with_others()
        optimizer = make(trainable(model), lr=0.01, weight_decay=0.1, betas=(0.8, 0.95))
        if make is own:
            attach(model, optimizer, RefLoRAConfig(method=own.method))
        gradients = _Fixed(model)
        for step in range(4):
            gradients.set(step)
            optimizer.step()
        ends.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    others = [name for name in ends[0] if "lora_" not in name]
    assert len(others) == 4
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in others)
    assert not any(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] if name not in others)


def test_groups_of_their_own_learning_rate() -> None:
    """lora_A at one rate and decay, lora_B at another, as LoRA+ does; a scheduler's change is followed."""
    groups = [{"lr": 0.004, "weight_decay": 0.3}, {"lr": 0.05, "weight_decay": 0.0}]

    class PerSide(RiteOracle):
        """The oracle takes both factors of a pair in one group."""

        def __init__(self, factors: list[Tensor]) -> None:
            super().__init__(factors, lr=0.0)
            for pair in self._pairs:
                for side, group in zip(pair, groups, strict=True):
                    side.group = group

    def halve() -> None:
        for group in schedule:
            group["lr"] = group["lr"] / 2

    model = small_model()
    factors = factors_in_pairs(model)
    optimizer = LoRARite([{"params": factors[i::2], **groups[i]} for i in (0, 1)])
    attach(model, optimizer, CONFIG)
    schedule: list[dict[str, Any]] = optimizer.param_groups
    trained = train_small(model, optimizer, small_batches(4), halve)
    model, schedule = small_model(), groups
    expected = train_small(model, PerSide(factors_in_pairs(model)), small_batches(4), halve)
    assert worst_factor_error(trained, expected) < TOLERANCE


@pytest.mark.parametrize("method", METHOD_OPTIMIZERS)
@pytest.mark.parametrize("missing", ["lora_A", "lora_B", "both"])
def test_no_gradient_counts_as_zero(missing: str, method: str) -> None:
    """A pair that the loss does not reach gets what a gradient of zeros gives."""
    ends = []
    for absent in (True, False):
        model = small_model()
        optimizer, _ = own_optimizer(method, model, weight_decay=0.1)
        for batch in small_batches(3):
            backward(model, batch)
            for name, parameter in named_factors(model).items():
                if "second" in name and (missing == "both" or missing in name):
                    parameter.grad = None if absent else torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: f.detach() for name, f in named_factors(model).items()})
    assert worst_factor_error(*ends) == 0.0


@pytest.mark.parametrize("options", [{}, {"clip_unmagnified_grad": 0.0}], ids=["clipping", "no clipping"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(value: float, options: dict[str, Any]) -> None:
    """As with AdamW it makes its pair not finite, and no other."""
    model = small_model()
    optimizer, _ = rite(model, **options)
    backward(model, small_batches(1)[0])
    parameters = named_factors(model)
    bad = next(name for name in parameters if "first" in name and "lora_A" in name)
    parameters[bad].grad[0, 0] = value
    optimizer.step()
    finite = {name: bool(f.isfinite().all()) for name, f in parameters.items()}
    assert not finite[bad] and all(finite[name] for name in finite if "second" in name)


# --- attach, detach, refusals ---
