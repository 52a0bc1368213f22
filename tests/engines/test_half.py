"""float16 gradients: where the new ones would leave its range, a pair is plain LoRA, bit for bit and on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.nn.parallel import DistributedDataParallel

from reflora_dist import RefLoRAConfig, attach, tall_adapters
from reflora_dist.algebra.types import SIDE_A, SIDE_B
from reflora_dist.methods.reference import refactored
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from reflora_dist.step.traffic import Traffic
from tests.support import oracles
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES as LLAMA_ENGINES
from tests.support.engines_under_test.zero import fp16_config
from tests.support.probe import _whole
from tests.support.workloads import Settings

R, SIZE = 4, 16
LARGEST = torch.finfo(torch.float16).max
EXPONENTS = range(-8, 5)
SWEEP = [(10.0**a, 10.0**b) for a in EXPONENTS for b in EXPONENTS]
CONFIGS = [
    RefLoRAConfig(method="reflora", warmup_steps=0),
    RefLoRAConfig(method="scaled-gd", damping=0.0),
    RefLoRAConfig(method="scaled-gd"),
    RefLoRAConfig(method="lora-pro", warmup_steps=0),
]
Scales = Sequence[tuple[float, float]]
"""Of lora_A and lora_B of every pair."""
Factors = list[list[Tensor]]
"""What there is of lora_A and of lora_B, pair by pair."""


def _model(scales: Scales, dtype: torch.dtype = torch.float16) -> PeftModel:
    """A layer for each; what float16 can hold, whatever the dtype."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in scales))
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=[str(layer) for layer in range(len(scales))])
    model = get_peft_model(layers, config, autocast_adapter_dtype=False).to(dtype)
    of_factors = [scale for pair in scales for scale in pair]
    for parameter, scale in zip(_trainable(model), of_factors, strict=True):
        parameter.data = (scale * torch.randn(parameter.shape, generator=generator)).half().to(dtype)
    return model


def _gradients(pairs: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(size * torch.randn(*shape, generator=generator)).half() for shape in pairs * [(R, SIZE), (SIZE, R)]]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _by_pair(tensors: Sequence[Tensor]) -> Factors:
    return [[tensors[factor].detach(), tensors[factor + 1].detach()] for factor in range(0, len(tensors), 2)]


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    integers = {2: torch.int16, 4: torch.int32}
    as_bits = [[tensor.view(integers[tensor.element_size()]) for tensor in tensors] for tensors in (some, others)]
    return all(map(torch.equal, *as_bits))


def _stepped(
    config: RefLoRAConfig, scales: Scales, gradients: list[Tensor], dtype: torch.dtype = torch.float16
) -> tuple[Factors, int]:
    """Gradients after a step, and how many pairs were left as they were."""
    model = _model(scales, dtype)
    parameters = _trainable(model)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(dtype, copy=True)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    handle = attach(model, optimizer, config)
    optimizer.step()
    return _by_pair([parameter.grad for parameter in parameters]), handle.report().skipped_pairs


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.damping}")
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_a_gradient_is_rounded_once_or_left_alone(config: RefLoRAConfig, size: float) -> None:
    """At every scale of the factors: what float64 makes of the same values, or all of the pair as it was."""
    gradients = _gradients(len(SWEEP), size)
    after, skipped = _stepped(config, SWEEP, gradients)
    exact, unsolved = _stepped(config, SWEEP, gradients, torch.float64)
    left = 0
    for new, wide, old, scales in zip(after, exact, _by_pair(gradients), SWEEP, strict=True):
        rounded = [tensor.half() for tensor in wide]
        left += not _finite(rounded)
        assert _same_bits(new, rounded if _finite(rounded) else old), scales
    assert skipped == unsolved + left
    damped = config.method == "scaled-gd" and config.damping  # a gradient grows a hundredfold at most
    assert left == 0 if damped and size == 1.0 else left > 10


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.damping}")
def test_what_was_not_finite_stays_so(config: RefLoRAConfig, value: float) -> None:
    """An overflow of the backward is there for whoever scales the loss; the other pair is refactored."""
    scales, gradients = [(1.0, 1.0), (1.0, 1.0)], _gradients(2)
    expected, _ = _stepped(config, scales, gradients)
    gradients[3][2, 1] = value
    after, skipped = _stepped(config, scales, gradients)
    assert _same_bits(after[1], gradients[2:]) and not _finite(after[1])
    assert _same_bits(after[0], expected[0]) and not _same_bits(after[0], gradients[:2])
    assert skipped == 1


@pytest.mark.parametrize(("overflows", "scale"), [(True, 2.0**7), (False, 2.0**8)])
def test_a_loss_scaler_sees_what_backward_left(overflows: bool, scale: float) -> None:
    """A fused optimizer's step is left out where backward overflows, and not where only the new gradient would."""
    model = _model([(1.0, 1.0), (1e-4, 1.0)])
    parameters = _trainable(model)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, eps=1e-4, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    handle = attach(model, optimizer, CONFIGS[0])
    scaler.scale(model(torch.ones(1, SIZE, dtype=torch.float16)).float().mean()).backward()
    parameters[3].grad.fill_(float("inf") if overflows else 100.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale and handle.report().skipped_pairs == 1
    assert _finite(parameters) and _same_bits(before, parameters) == overflows


def _rescaled(config: RefLoRAConfig) -> tuple[Factors, int]:
    """A, B, and their moments, pair by pair, after a step of Adam with an eps that float16 has."""
    model = _model(SWEEP)
    parameters = _trainable(model)
    for parameter, gradient in zip(parameters, _gradients(len(SWEEP), 30.0), strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-4)
    handle = attach(model, optimizer, config)
    optimizer.step()
    kinds = [_by_pair([optimizer.state[p][key] for p in parameters]) for key in ("exp_avg", "exp_avg_sq")]
    pairs = zip(_by_pair(parameters), *kinds, strict=True)
    return [[*factors, *first, *second] for factors, first, second in pairs], handle.report().skipped_pairs


def test_a_pair_is_balanced_whole_or_not_at_all() -> None:
    """BaLoRA: factors and the moments that go along with them, as float64 makes them of the same values."""
    after, skipped = _rescaled(RefLoRAConfig(method="balora", carry_moments=True))
    plain, _ = _rescaled(RefLoRAConfig(method="lora"))
    left = 0
    for new, old, scales in zip(after, plain, SWEEP, strict=True):
        lora_a, lora_b, *moments = exact = [tensor.double() for tensor in old]
        states = [{"exp_avg": moments[side], "exp_avg_sq": moments[2 + side]} for side in (SIDE_A, SIDE_B)]
        optimizer: Any = SimpleNamespace(state=dict(zip((lora_a, lora_b), states, strict=True)))
        unsolved = oracles.balanced(lora_a, lora_b) is None
        oracles.balance_(lora_a, lora_b, optimizer, carry_moments=True)
        if unsolved or max(float(tensor.abs().max()) for tensor in exact) > LARGEST:
            assert _same_bits(new, old), scales
            left += 1
            continue
        for tensor, expected in zip(new, exact, strict=True):
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-3, atol=1e-7)
    assert skipped == left > 20


def test_a_pair_is_rescaled_whole_or_not_at_all() -> None:
    """RefLoRA-S: factors and moments of a pair, of which the second one goes with the ratio of its factors."""
    after, skipped = _rescaled(RefLoRAConfig(method="reflora-s", warmup_steps=1))
    plain, _ = _rescaled(RefLoRAConfig(method="lora"))
    left = 0
    for new, old, scales in zip(after, plain, SWEEP, strict=True):
        factor = (old[1].double().norm() / old[0].double().norm()).sqrt()
        powers = [factor, 1 / factor, 1 / factor, factor, factor**-2, factor**2]
        scaled = [tensor.double() * power for tensor, power in zip(old, powers, strict=True)]
        if max(float(tensor.abs().max()) for tensor in scaled) > LARGEST:
            assert _same_bits(new, old), scales
            left += 1
            continue
        for tensor, expected in zip(new, scaled, strict=True):
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-3, atol=1e-7)
    assert skipped == left > 20


def _updated(method: str, scales: Scales, gradients: list[Tensor]) -> tuple[Factors, Factors, int]:
    """Factors and moments before and after a step of an optimizer without limits of its own."""
    model = _model(scales)
    parameters = _trainable(model)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    options = {
        "lora-rite": {"lr": 0.1, "update_skipping": 0.0, "clip_unmagnified_grad": 0.0},
        "lora-muon": {"lr": 10.0},  # the norm of a step, whatever the gradient
    }
    optimizer = METHOD_OPTIMIZERS[method](parameters, **options[method])
    handle = attach(model, optimizer, RefLoRAConfig(method=method))
    pairs = []
    for step in (optimizer.step, lambda: None):
        tensors = [[p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]] for p in parameters]
        copies = [[tensor.detach().clone() for tensor in of_factor] for of_factor in tensors]
        pairs.append([copies[factor] + copies[factor + 1] for factor in range(0, len(copies), 2)])
        step()
    return pairs[0], pairs[1], handle.report().skipped_pairs


def _is_deficient(pair: list[Tensor]) -> bool:
    """Whether a factor, of a lora_A and its moments and a lora_B and its moments, has not full rank."""
    return any(int(torch.linalg.matrix_rank(factor.double(), rtol=1e-6)) < R for factor in (pair[0], pair[3]))


@pytest.mark.parametrize("method", METHOD_OPTIMIZERS)
def test_an_update_of_an_optimizer_stays_in_range(method: str) -> None:
    """It grows where a factor is small: then the pair and its moments stay. A broken gradient is not hidden."""
    before, after, skipped = _updated(method, SWEEP, _gradients(len(SWEEP)))
    assert all(map(_finite, after))
    counted = [
        _same_bits(old, new) or (method == "lora-muon" and _is_deficient(old))
        for old, new in zip(before, after, strict=True)
    ]
    assert 20 < sum(map(_same_bits, before, after)) < 120
    assert skipped == sum(counted)
    gradients = _gradients(2)
    gradients[3][2, 1] = float("inf")
    _, (first, second), skipped = _updated(method, [(1.0, 1.0), (1.0, 1.0)], gradients)
    assert _finite(first) and not _finite(second) and skipped == 0  # as with AdamW


LAYOUTS = [
    *[("ddp", True), ("fsdp2", True)],  # ZeRO compiles its Adam for CPUs here, which takes two minutes
    *(
        pytest.param(engine, tall, marks=pytest.mark.all_ranks)
        for engine in ("ddp", "fsdp1", "fsdp1-flat", "fsdp1-low-precision", "fsdp2", "zero2", "zero3")
        for tall in (True, False)
        if (engine, tall) not in (("ddp", True), ("fsdp2", True))
    ),
]


def _wrapped(engine: str, tall: bool, scales: Scales) -> Any:
    """Two layers in float16, but for those whose gradients alone are."""
    model = _model(scales, torch.float32 if engine == "fsdp1-low-precision" else torch.float16)
    if tall:
        tall_adapters(model)
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine == "fsdp2":
        return fully_shard(model)
    low = MixedPrecision(param_dtype=torch.float16, keep_low_precision_grads=True)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if engine == "fsdp1-flat" else None,
        use_orig_params=engine != "fsdp1-flat",
        mixed_precision=low if engine == "fsdp1-low-precision" else None,
        device_id=torch.device("cpu"),
    )


def _step(engine_name: str, tall: bool, scales: Scales) -> tuple[Any, Any, Callable[[], None]]:
    """A wrapped model, its optimizer, and a step of it."""
    if engine_name.startswith("zero"):
        model = _model(scales)
        if tall:
            tall_adapters(model)
        masters = fp16_config(fp16_master_weights_and_grads=True, initial_scale_power=4)
        split = {"sub_group_size": R * SIZE // 2} if engine_name == "zero3-split" else {}  # each factor by itself
        wrap: Any = LLAMA_ENGINES[f"{engine_name[:5]}-offload-cpu-adam"].wrap
        zero = wrap(model, Settings(), 2, more=masters, **split)

        def step() -> None:
            zero.backward(zero.model(torch.ones(2, SIZE, dtype=torch.float16)).float().mean())
            zero.step()

        return zero.model, zero.optimizer, step
    wrapped = _wrapped(engine_name, tall, scales)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        wrapped(torch.ones(2, SIZE, dtype=torch.float16)).float().mean().backward()
        optimizer.step()

    return wrapped, optimizer, step


def _of_one_row(rank: int, world_size: int, engine_name: str, tall: bool, side: int) -> dict[str, Any]:
    """A step of which only the last row of a tall factor of the second pair leaves float16."""
    wrapped, optimizer, step = _step(engine_name, tall, [(1.0, 1.0), (1e-2, 1.0) if side == SIDE_B else (1.0, 1e-2)])
    handle = attach(wrapped, optimizer, CONFIGS[0])
    engine = handle._engine
    gradients = _gradients(2)
    last_row = gradients[3][-1] if side == SIDE_B else gradients[2][:, -1]
    last_row *= 3e3
    outcome: dict[str, Any] = {"before": gradients, "after": {}, "firings": 0}
    outcome["weights"] = _whole(engine, engine.weights())

    def write(*_: Any) -> None:
        for factor, (local, layout) in enumerate(zip(engine.gradients(), engine.layouts(), strict=True)):
            stored = gradients[factor] if layout.columns or factor % 2 else gradients[factor].mT
            piece = layout.piece(rank if engine.group is not None else 0)
            if local is not None and engine.firing().present[factor]:
                assert local.dtype == torch.float16
                local.copy_(stored.flatten()[piece.start : piece.stop].view(local.shape))

    def read(*_: Any) -> None:
        present = engine.firing().present
        outcome["firings"] += 1
        whole = _whole(engine, [g if p else None for g, p in zip(engine.gradients(), present, strict=True)])
        outcome["after"].update({factor: gradient for factor, gradient in whole.items() if present[factor]})

    first = engine.optimizer.register_step_pre_hook(write)
    engine.optimizer._optimizer_step_pre_hooks.move_to_end(first.id, last=False)
    engine.optimizer.register_step_pre_hook(read)
    step()
    report, ranks = handle.report(), world_size if engine.group else 1
    traffic = Traffic(handle.config, engine.layouts(), ranks, torch.device("cpu"), half=True)
    outcome["skipped"] = report.skipped_pairs
    outcome["reported"] = (report.bytes_per_step, report.collectives_per_step)
    outcome["planned"] = (traffic.sent(rank), traffic.collectives)
    return outcome


def _exact_and_before(outcome: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What float64 makes of the gradients, what they were, and what they are."""
    weights, before, after = (
        [outcome[key][factor].detach().double() for factor in range(4)] for key in ("weights", "before", "after")
    )
    return [*refactored(*weights[:2], *before[:2]), *refactored(*weights[2:], *before[2:])], before, after


@pytest.mark.parametrize(("engine", "tall"), LAYOUTS)
def test_all_ranks_leave_a_pair_that_overflows_on_one(engine: str, tall: bool) -> None:
    """Both factors of it, wherever they lie; the other pair is refactored. One more all-reduce is all that it takes."""
    for outcome in run_ranks(_of_one_row, 2, engine, tall, SIDE_B):
        exact, before, after = _exact_and_before(outcome)
        *others, overflow = [float(part.abs().max()) for part in (*exact[:3], exact[3][:-1], exact[3][-1])]
        assert max(others) < LARGEST < overflow
        assert all(map(torch.equal, after, [exact[0].half().double(), exact[1].half().double(), *before[2:]]))
        assert outcome["skipped"] == 1
        assert outcome["reported"] == outcome["planned"]
        assert outcome["planned"][1].get("all_reduce", 0) == (0 if engine == "ddp" else 2)


@pytest.mark.all_ranks
@pytest.mark.parametrize(("side", "kept"), [(SIDE_A, 2), (SIDE_B, 3)])
def test_a_pair_of_two_firings_is_left_from_where_it_overflows(side: int, kept: int) -> None:
    """Sub-groups of one factor: lora_A is updated when lora_B is met; what overflows first takes the other along."""
    for outcome in run_ranks(_of_one_row, 2, "zero3-split", True, side):
        exact, before, after = _exact_and_before(outcome)
        expected = [tensor.half().double() for tensor in exact[:kept]] + before[kept:]
        assert outcome["firings"] == 4
        assert all(map(torch.equal, after, expected))
        assert outcome["skipped"] == 1
