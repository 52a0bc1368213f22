"""LoRA-RITE as an optimizer: every option against its oracle, invariance, the other parameters, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from reflora_dist import LoRARite, RefLoRAConfig, attach
from reflora_dist.adapters import find_pairs
from reflora_dist.update import packed_size
from tests.cluster import run_ranks
from tests.engines_under_test import ENGINES, zero
from tests.engines_under_test.common import _train_on, copied
from tests.oracles import RiteOracle, factors_in_pairs, train_oracle
from tests.small import backward, products, small_batches, small_model, train_small, trainable
from tests.test_refactor import factor
from tests.workloads import (
    FACTOR_TOLERANCE,
    LOSS_TOLERANCE,
    TINY_LORA,
    Factors,
    Settings,
    build_model,
    load_reference,
    named_factors,
    needs_reference,
    plain_name,
    synthetic_workload,
    train_single,
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


def rite(model: nn.Module, **settings: Any) -> Any:
    """An attached optimizer of all that is trainable, and its handle."""
    optimizer = LoRARite(trainable(model), **{"lr": 0.02, **settings})
    return optimizer, attach(model, optimizer, CONFIG)


def _worst_error(factors: Factors, expected: Factors) -> float:
    """`worst_factor_error` that bears a factor of zeros."""
    return max(float((factors[n] - e).norm() / e.norm().clamp_min(1e-12)) for n, e in expected.items())


@needs_reference
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


def _mixed(model: nn.Module, condition: float) -> nn.Module:
    """The same products from other factors, ``(M A, B M^-1)``."""
    with torch.no_grad():
        for seed, (lora_a, lora_b) in enumerate(zip(*[iter(factors_in_pairs(model))] * 2, strict=True)):
            mix = 3.0 * factor(lora_a.shape[0], lora_a.shape[0], condition, seed)
            lora_a.copy_(mix @ lora_a)
            lora_b.copy_(lora_b @ torch.linalg.inv(mix))
    return model


def _distance(make: Callable[[nn.Module], torch.optim.Optimizer], condition: float) -> tuple[float, float]:
    """How far the products of the two starts are apart after six steps, and how far they have moved."""
    start = products(small_model())
    ends = []
    for model in (small_model(), _mixed(small_model(), condition)):
        train_small(model, make(model), small_batches(6))
        ends.append(products(model))

    def largest(left: list[Tensor], right: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(left, right, strict=True))

    return largest(ends[1], ends[0]), largest(ends[0], start)


@pytest.mark.parametrize("options", [{}, {"apply_escape": True, "update_capping": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize("condition", [1.0, 30.0])
def test_the_product_does_not_depend_on_the_factors(condition: float, options: dict[str, Any]) -> None:
    """Rotated, rescaled or mixed by any invertible M, the trajectory of B A is the same over a whole training."""
    apart, moved = _distance(lambda model: rite(model, **options)[0], condition)
    assert moved > 1e-2 and apart < 1e-6 * moved


def test_under_adamw_the_product_depends_on_the_factors() -> None:
    apart, moved = _distance(lambda model: torch.optim.AdamW(trainable(model), lr=0.02), 1.0)
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


def test_other_parameters_follow_adamw_exactly() -> None:
    """A whole head and a norm's weights are bit-equal to torch's AdamW with the same settings."""
    ends = []
    for make in (LoRARite, torch.optim.AdamW):
        model = _with_others()
        optimizer = make(trainable(model), lr=0.01, weight_decay=0.1, betas=(0.8, 0.95))
        if make is LoRARite:
            attach(model, optimizer, CONFIG)
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


@pytest.mark.parametrize("missing", ["lora_A", "lora_B", "both"])
def test_no_gradient_counts_as_zero(missing: str) -> None:
    """A pair that the loss does not reach gets what a gradient of zeros gives."""
    ends = []
    for absent in (True, False):
        model = small_model()
        optimizer, _ = rite(model, weight_decay=0.1)
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


def test_step_before_attach() -> None:
    """With gradients it raises and changes nothing; with zeros it creates the state and nothing else."""
    model = small_model()
    optimizer = LoRARite(trainable(model), lr=0.1)
    before = [p.detach().clone() for p in trainable(model)]
    backward(model, small_batches(1)[0])
    with pytest.raises(RuntimeError, match=r"LoRARite.step\(\) before attach\(\)"):
        optimizer.step()
    for parameter in trainable(model):
        parameter.grad.zero_()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, trainable(model), strict=True))
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    # and training afterwards is that of a new optimizer
    attach(model, optimizer, CONFIG)
    trained = train_small(model, optimizer, small_batches(3))
    fresh = small_model()
    assert worst_factor_error(trained, train_small(fresh, rite(fresh, lr=0.1)[0], small_batches(3))) == 0.0


def test_after_detach_a_step_raises_again() -> None:
    model = small_model()
    optimizer, handle = rite(model)
    train_small(model, optimizer, small_batches(1))
    handle.detach()
    backward(model, small_batches(1)[0])
    with pytest.raises(RuntimeError, match=r"before attach\(\)"):
        optimizer.step()
    attach(model, optimizer, CONFIG)
    optimizer.step()


def test_detached_and_attached_again_it_continues() -> None:
    ends = []
    for interrupted in (False, True):
        model = small_model()
        optimizer, handle = rite(model)
        for index, batch in enumerate(small_batches(4)):
            if interrupted and index == 2:
                handle.detach()
                handle = attach(model, optimizer, CONFIG, state_dict=handle.state_dict())
            train_small(model, optimizer, [batch])
        ends.append({name: f.detach() for name, f in named_factors(model).items()})
        assert handle.report().steps == 4
    assert worst_factor_error(*ends) == 0.0


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("lora-rite", torch.optim.AdamW),
        ("reflora", LoRARite),
        ("reflora-s", LoRARite),
        ("scaled-gd", LoRARite),
        ("lora", LoRARite),
    ],
)
def test_optimizer_and_method_that_do_not_go_together(method: str, make: Any) -> None:
    model = small_model()
    with pytest.raises(ValueError, match="LoRA-RITE is an optimizer of its own"):
        attach(model, make(trainable(model), lr=1e-3), RefLoRAConfig(method=method))


@pytest.mark.parametrize(("r", "refused"), [(9, False), (10, True)])
def test_a_factor_with_less_rows_than_r(r: int, refused: bool) -> None:
    """``second`` has 9 outputs: with r = 10 its lora_B has no 10 orthonormal directions."""
    model = small_model(r=r)
    optimizer = LoRARite(trainable(model))
    if refused:
        with pytest.raises(ValueError, match=r"second.*has r=10 with in=14, out=9: lower r"):
            attach(model, optimizer, CONFIG)
    else:
        attach(model, optimizer, CONFIG)
        assert all(f.isfinite().all() for f in train_small(model, optimizer, small_batches(3)).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"clip_unmagnified_grad": -1.0},
        {"update_capping": -1.0},
        {"update_skipping": -1.0},
        {"lr": float("nan")},
    ],
)
def test_values_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        LoRARite([nn.Parameter(torch.zeros(2, 2))], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 1}, "is the optimizer itself and acts in every step: leave out warmup_steps=1"),
        ({"interval": 2}, "interval=2"),
        ({"overlap": True}, "overlap=True means nothing to method='lora-rite'"),
    ],
)
def test_schedules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefLoRAConfig(method="lora-rite", **settings)


# --- state ---


def test_state_has_the_shapes_of_adams() -> None:
    """Nothing but moments of the parameter's own shape; the second one's head holds all there is."""
    model = small_model()
    optimizer, _ = rite(model, apply_escape=True)
    train_small(model, optimizer, small_batches(3))
    for parameter, state in optimizer.state.items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        size = packed_size(3)
        assert state["exp_avg_sq"].view(-1)[:size].all() and not state["exp_avg_sq"].view(-1)[size:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_by_bit(dtype: torch.dtype) -> None:
    """Saved, pickled and loaded into a new optimizer; moments of bf16 weights stay fp32."""
    batches = small_batches(6, dtype=dtype)
    model = small_model(dtype=dtype)
    optimizer, _ = rite(model, apply_escape=True)
    train_small(model, optimizer, batches[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    expected = train_small(model, optimizer, batches[3:])

    file.seek(0)
    resumed = LoRARite(trainable(other), lr=0.02, apply_escape=True)
    resumed.load_state_dict(torch.load(file))
    attach(other, resumed, CONFIG)
    moments = torch.promote_types(dtype, torch.float32)
    assert all(s[key].dtype == moments for s in resumed.state.values() for key in ("exp_avg", "exp_avg_sq"))
    factors = train_small(other, resumed, batches[3:])
    assert all(torch.equal(factors[name], expected[name]) for name in expected)


# --- on several ranks ---


class _Both:
    """The oracle for factors and AdamW for everything else, as one optimizer."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        factors = factors_in_pairs(model)
        taken = {id(factor) for factor in factors}
        others = [parameter for parameter in trainable(model) if id(parameter) not in taken]
        adamw = torch.optim.AdamW(others, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        self._parts = [RiteOracle(factors, **settings.lora_rite()), adamw]

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad()


WITH_OTHERS = Settings(weight_decay=0.1, betas=(0.8, 0.95), rite={})


def _llama_with_others(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Norms and the whole head are trained beside the factors, between which the norms lie."""
    model = build_model(synthetic_workload(), dtype=dtype, modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.requires_grad_(True)
    return model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _with_others_on_ranks(rank: int, world_size: int, engine: str) -> Factors:
    zero.assert_zero_shards = lambda *_: None  # which counts factors only
    wrapped = ENGINES[engine].wrap(_llama_with_others(), WITH_OTHERS, 12 // world_size)
    attach(wrapped.model, wrapped.optimizer, CONFIG)
    for batch in synthetic_workload().batches:
        _train_on(wrapped, batch)
    parameters = _trained(getattr(wrapped.model, "module", wrapped.model))
    if engine.startswith("zero3"):
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return copied(parameters)
    if engine == "fsdp2":
        return {name: p.full_tensor().detach().clone() for name, p in parameters.items()}
    return copied(parameters)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3-subgroups"])
def test_other_parameters_on_ranks(engine: str) -> None:
    """Norms and head end where AdamW takes them, factors where the oracle does, also in flat buffers they share."""
    model = _llama_with_others(torch.float64)
    train_single(model, synthetic_workload().batches, WITH_OTHERS, optimizer=_Both(model, WITH_OTHERS))
    expected = copied(_trained(model))
    assert len(expected) == 28 + 4 + 1
    start = copied(_trained(_llama_with_others()))
    for trained in run_ranks(_with_others_on_ranks, 2, engine):
        assert worst_factor_error(trained, expected) < FACTOR_TOLERANCE
        assert min(float((trained[n] - start[n]).norm() / start[n].norm()) for n in trained) > 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PerSide(Settings):
    """lora_A and lora_B in groups of their own rate and decay."""

    rite: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    sides: tuple[dict[str, float], ...] = ({"lr": 2e-3, "weight_decay": 0.3}, {"lr": 2e-2, "weight_decay": 0.0})

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        groups = list(parameters)
        if not isinstance(groups[0], dict):
            lora_rank = TINY_LORA["r"]
            is_a = [parameter.shape[0] == lora_rank for parameter in groups]
            groups = [{"params": [p for p, a in zip(groups, is_a, strict=True) if a == side]} for side in (True, False)]
        return LoRARite([{**group, **side} for group, side in zip(groups, self.sides, strict=True)], betas=self.betas)


def _two_rates(rank: int, world_size: int, engine: str) -> Factors:
    workload = synthetic_workload()
    model = build_model(workload)
    return ENGINES[engine].train(model, workload.batches, _PerSide(), lambda m, o: attach(m, o, CONFIG))[1]


@pytest.mark.parametrize("engine", ["fsdp2", "zero2-two-groups", "zero3-two-groups"])
def test_groups_of_their_own_learning_rate_on_ranks(engine: str) -> None:
    """Each firing of DeepSpeed's optimizer shows one group only; the update at the end knows the rates of both."""
    settings = _PerSide()
    model = build_model(synthetic_workload(), dtype=torch.float64)
    oracle = RiteOracle(factors_in_pairs(model), lr=0.0)
    for pair in oracle._pairs:
        for side, group in zip(pair, settings.sides, strict=True):
            side.group = dict(group)
    _, expected = train_single(model, synthetic_workload().batches, settings, optimizer=oracle)
    for factors in run_ranks(_two_rates, 2, engine):
        assert worst_factor_error(factors, expected) < FACTOR_TOLERANCE


def _held_state(rank: int, world_size: int, engine: str) -> tuple[int, int, list[str]]:
    workload = synthetic_workload()
    settings = Settings(rite={"apply_escape": True})
    wrapped = ENGINES[engine].wrap(build_model(workload), settings, 12 // world_size)
    handle = attach(wrapped.model, wrapped.optimizer, CONFIG)
    for batch in workload.batches[:2]:
        _train_on(wrapped, batch)
    pairs, held, whole = handle._engine.pairs, 0, []
    shapes = [shape for pair in pairs for shape in (pair.shape_a, pair.shape_b)]
    for index, (moments, (rows, columns)) in enumerate(zip(handle._engine.moments(), shapes, strict=True)):
        assert moments.keys() == {"exp_avg", "exp_avg_sq"}
        held += sum(moment.numel() for moment in moments.values())
        if any(moment.numel() == rows * columns for moment in moments.values()):
            whole.append(f"{pairs[index // 2].name} {index % 2}")
    kept = [value for state in handle._engine.optimizer.state.values() for value in state.values()]
    locals_ = [value.to_local() if hasattr(value, "to_local") else value for value in kept]
    return sum(value.numel() for value in locals_ if value.dim()), held, whole


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2-shard1", "fsdp1-full", "fsdp1-flat", "zero1", "zero2", "zero3"])
def test_moments_stay_sharded(engine: str) -> None:
    """All that the optimizer keeps is two numbers per element of the factors, dealt out over the ranks."""
    pairs = find_pairs(build_model(synthetic_workload()))
    total = 2 * sum(pair.lora_rank * (pair.in_features + pair.out_features) for pair in pairs)
    results = run_ranks(_held_state, 4, engine)
    assert sum(held for _, held, _ in results) == total
    for everything, held, whole in results:
        assert everything <= total / 4 * 1.05 + 2000, "state beside the moments"  # DeepSpeed and FSDP1 pad
        if engine in ("fsdp2", "fsdp2-shard1", "zero3"):
            assert not whole
            assert held <= total / 4 * 1.05


def _large_rank(rank: int, world_size: int) -> Factors:
    workload = synthetic_workload(lora=LARGE_RANK)
    settings = Settings(rite={})
    return ENGINES["fsdp2-shard1"].train(
        build_model(workload), workload.batches, settings, lambda m, o: attach(m, o, CONFIG)
    )[1]


LARGE_RANK = {"r": 16, "lora_alpha": 32}


def test_second_moments_over_several_rows_of_a_column_shard() -> None:
    """r = 16: 137 numbers at the head of a lora_A of 64 columns, of which each of two ranks has half."""
    workload = synthetic_workload(lora=LARGE_RANK)
    model = build_model(workload, dtype=torch.float64)
    oracle = RiteOracle(factors_in_pairs(model), **Settings(rite={}).lora_rite())
    _, expected = train_single(model, workload.batches, Settings(), optimizer=oracle)
    for factors in run_ranks(_large_rank, 2):
        assert worst_factor_error(factors, expected) < FACTOR_TOLERANCE
