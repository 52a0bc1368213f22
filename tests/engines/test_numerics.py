"""How exact the refactorization is, gradients in and gradients out, under every engine and against float64."""

from __future__ import annotations

import functools

import pytest
import torch

import reflora_dist.algebra.tall_blocks
from reflora_dist import RefLoRAConfig
from reflora_dist.methods.reference import ReferenceRefLoRA
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.probe import refactoring_of_one_step
from tests.support.workloads import (
    Settings,
    Workload,
    build_model,
    named_factors,
    synthetic_workload,
    worst_factor_error,
)

# What one rounding of a gradient to its dtype leaves, in the Frobenius norm, and a little for the fp32 product.
FP32_TOLERANCE = 1e-6
BF16_TOLERANCE = 4e-3

ILL_CONDITIONED = {"cond_a": 1e2, "cond_b": 1e4}
IMMEDIATELY = RefLoRAConfig(method="reflora", warmup_steps=0)

ENGINES_AND_RANKS = [
    ("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2-shard1", 2), ("fsdp2-hsdp", 4),
    ("fsdp1-full", 2), ("fsdp1-full", 3), ("fsdp1-flat", 2), ("fsdp1-hybrid", 4), ("zero1", 3), ("zero2", 2),
    ("zero2-two-groups", 3), ("zero3", 2), ("zero3", 3), ("zero3-two-groups", 2), ("zero3-subgroups", 3),
    # computed in bf16, refactored in the fp32 that the optimizer reads
    ("fsdp2-bf16", 2), ("fsdp1-bf16", 2), ("zero1-bf16", 2), ("zero2-bf16-masters", 2), ("zero3-bf16-masters", 2),
]  # fmt: skip
_AGAIN = [("fsdp2", 2), ("fsdp1-full", 3), ("zero3", 2)]  # engines that run on another number of ranks by default


def with_condition(factor: torch.Tensor, condition: float) -> torch.Tensor:
    """The factor with the same singular vectors and singular values spread evenly in the logarithm."""
    u, d, v_t = torch.linalg.svd(factor.double(), full_matrices=False)
    spread = d[0] * torch.logspace(0, -float(torch.log10(torch.tensor(condition))), d.numel(), dtype=torch.float64)
    return ((u * spread) @ v_t).float()


def ill_conditioned_workload(cond_a: float, cond_b: float, **overrides: object) -> Workload:
    workload = synthetic_workload(seed=3, **overrides)
    for name, factor in workload.initial_factors.items():
        workload.initial_factors[name] = with_condition(factor, cond_a if "lora_A" in name else cond_b)
    return workload


def _refactoring_error(rank: int, world_size: int, engine: str, dtype: torch.dtype, grams_in_fp32: bool) -> float:
    if grams_in_fp32:
        _spoil_grams()
    workload = ill_conditioned_workload(**ILL_CONDITIONED)
    builder = ENGINES[engine]
    model = build_model(workload, dtype=builder.model_dtype if dtype == torch.float32 else dtype)
    wrapped = builder.wrap(model, Settings(), workload.batches.shape[1] // world_size)
    refactoring, handle = refactoring_of_one_step(wrapped, workload.batches[0], IMMEDIATELY)
    report = handle.report()
    assert report.skipped_pairs == 0 and report.applied_steps == 1
    assert all(refactoring.changed())
    return refactoring.worst_error()


def _spoil_grams() -> None:
    exact = reflora_dist.algebra.tall_blocks.BlockSet.grams

    def in_fp32(self, blocks):
        rounded = [None if b is None else b.float() for b in blocks]
        exact_grams = exact(self, rounded)
        return {r: gram.float().double() for r, gram in exact_grams.items()}

    reflora_dist.algebra.tall_blocks.BlockSet.grams = in_fp32


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        pytest.param(*case, marks=[pytest.mark.all_ranks] if case in _AGAIN else [], id="-".join(map(str, case)))
        for case in ENGINES_AND_RANKS
    ],
)
def test_refactored_gradient_is_exact(engine: str, world_size: int) -> None:
    """cond(B) = 1e4 with cond(A) = 1e2: within 1e-6 of what float64 makes of the same gradients, unsharded."""
    errors = run_ranks(_refactoring_error, world_size, engine, torch.float32, False)
    assert max(errors) < FP32_TOLERANCE


def test_grams_in_fp32_would_fail() -> None:
    """The tolerance above means something: Grams rounded to fp32 miss it by orders of magnitude."""
    (error,) = run_ranks(_refactoring_error, 1, "single", torch.float32, True)
    assert error > 1e3 * FP32_TOLERANCE


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("fsdp2", 3), ("fsdp2-shard1", 2), ("fsdp1-full", 2)])
def test_refactored_bf16_gradient_is_rounded_once(engine: str, world_size: int) -> None:
    """bf16 weights as stored, bf16 gradients in: out comes the float64 result, rounded once to bf16."""
    errors = run_ranks(_refactoring_error, world_size, engine, torch.bfloat16, False)
    assert max(errors) < BF16_TOLERANCE


def _fp16_error(rank: int, world_size: int, engine: str) -> float:
    """fp16 compute with a scaled loss; the gradient is refactored scaled, as fused optimizers see it."""
    workload = ill_conditioned_workload(cond_a=1e1, cond_b=1e3)
    wrapped = ENGINES[engine].wrap(build_model(workload), Settings(), workload.batches.shape[1] // world_size)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    forward = wrapped.model.forward
    wrapped.model.forward = torch.autocast("cpu", torch.float16)(forward)
    wrapped.backward = lambda loss: scaler.scale(loss).backward()
    wrapped.step = lambda: (scaler.step(wrapped.optimizer), scaler.update())
    refactoring, handle = refactoring_of_one_step(wrapped, workload.batches[0], IMMEDIATELY)
    assert handle.report().applied_steps == 1
    return refactoring.worst_error()


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("fsdp2", 2), ("fsdp1-full", 2)])
def test_fp16_with_loss_scaling(engine: str, world_size: int) -> None:
    """The refactorization is linear, so a loss scale passes through it: exact for what comes out of fp16."""
    assert max(run_ranks(_fp16_error, world_size, engine)) < FP32_TOLERANCE


STARTS = {"B=0": (None, 0), "B=0,warmup": (None, 2), "cond1e3": (1e3, 0)}


def _train_from_all(rank: int, world_size: int, engine: str) -> dict[str, dict[str, torch.Tensor]]:
    from reflora_dist import attach

    trained = {}
    for name, (condition, warmup_steps) in STARTS.items():
        workload = _start(condition)
        config = RefLoRAConfig(method="reflora", warmup_steps=warmup_steps)
        model = build_model(workload, initial_factors=workload.initial_factors)
        attached = functools.partial(attach, config=config)
        _, trained[name] = ENGINES[engine].train(model, workload.batches, Settings(), attached)
    return trained


@functools.cache
def _trained(engine: str, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    return run_ranks(_train_from_all, world_size, engine)[0]


def _start(condition: float | None) -> Workload:
    """cond(B) as given, or PEFT's B = 0."""
    workload = ill_conditioned_workload(1e1, condition or 1.0)
    if condition is None:
        for name, factor in workload.initial_factors.items():
            if "lora_B" in name:
                factor.zero_()
    return workload


def train_in_float64(workload: Workload, config: RefLoRAConfig) -> dict[str, torch.Tensor]:
    """The oracle: one process, everything in float64."""
    model = build_model(workload, dtype=torch.float64)
    factors = named_factors(model)
    names = sorted(name for name in factors if "lora_A" in name)
    pairs = [(factors[name], factors[name.replace("lora_A", "lora_B")]) for name in names]
    settings = Settings()
    optimizer = torch.optim.AdamW(factors.values(), **settings.adamw())
    ReferenceRefLoRA(pairs, optimizer, config)
    for batch in workload.batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: factor.detach().clone() for name, factor in factors.items()}


@pytest.mark.parametrize(
    ("engine", "world_size"), [("ddp", 2), ("fsdp2", 3), ("fsdp1-full", 2), ("zero2", 2), ("zero3", 3)]
)
@pytest.mark.parametrize("start", STARTS)
def test_training_follows_float64(engine: str, world_size: int, start: str) -> None:
    """From PEFT's B = 0, with and without warm-up, and from cond(B) = 1e3: fp32 shards end where float64 ends.

    1e-3 and not 1e-4: Adam divides by the root of a squared gradient, and forward and backward are in fp32.
    """
    condition, warmup_steps = STARTS[start]
    factors = _trained(engine, world_size)[start]
    config = RefLoRAConfig(method="reflora", warmup_steps=warmup_steps)
    expected = train_in_float64(_start(condition), config)
    assert worst_factor_error({n: f.double() for n, f in factors.items()}, expected) < 1e-3
