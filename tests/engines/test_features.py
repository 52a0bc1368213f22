"""Optimizers, sizes and features of the engines that meet the refactorization: each works, or is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reflora_dist import RefLoRAConfig, attach, tall_adapters
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES, fsdp, zero
from tests.support.engines_under_test.common import Wrapped, train_on, trainable
from tests.support.oracles import trained_in_float64
from tests.support.recorder import CollectiveRecorder, check_collectives
from tests.support.workloads import (
    FACTOR_TOLERANCE,
    Settings,
    Workload,
    build_model,
    named_factors,
    synthetic_workload,
    with_method,
    worst_factor_error,
)

REFLORA = RefLoRAConfig(method="reflora", warmup_steps=0)


def train_single(
    workload: Workload, config: RefLoRAConfig, kind: type = torch.optim.AdamW, **options: Any
) -> dict[str, torch.Tensor]:
    """One process on whole batches, with the plain reference implementation instead of the package's engines."""
    from reflora_dist.methods.reference import ReferenceRefLoRA

    model = build_model(workload)
    factors = named_factors(model)
    names = [name for name in factors if "A." in name]
    optimizer = kind(trainable(model), **(options or Settings().adamw()))
    ReferenceRefLoRA([(factors[n], factors[n.replace("A.", "B.")]) for n in names], optimizer, config)
    for batch in workload.batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: factor.detach().clone() for name, factor in factors.items()}


# --- optimizers -------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 5e-3}),
    "adamw-foreach": (torch.optim.AdamW, {"lr": 5e-3, "foreach": True}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 5e-3, "fused": True}),
    "adamw-amsgrad": (torch.optim.AdamW, {"lr": 5e-3, "amsgrad": True}),
    "nadam": (torch.optim.NAdam, {"lr": 5e-3}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
}


OPTIMIZERS_OF: dict[str, list[tuple[str, str]]] = {
    "fsdp2": [(name, "reflora") for name in OPTIMIZERS]
    + [(name, "reflora-s") for name in ("adam", "adamw-fused", "adamw-amsgrad", "nadam")],
    "fsdp1-full": [("adamw-fused", "reflora")],
    "ddp": [("sgd-momentum", "reflora")],
}


def _with_optimizers(rank: int, world_size: int, engine: str) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    workload, trained = synthetic_workload(), {}
    for optimizer, method in OPTIMIZERS_OF[engine]:
        wrapped = ENGINES[engine].wrap(build_model(workload), Settings(), 12 // world_size)
        kind, options = OPTIMIZERS[optimizer]
        wrapped.optimizer = kind(trainable(wrapped.model), **options)
        attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(method=method, warmup_steps=0))
        for batch in workload.batches:
            train_on(wrapped, batch)
        trained[optimizer, method] = wrapped.factors()
    return trained


@functools.cache
def _trained_with_optimizers(engine: str) -> list[Any]:
    return run_ranks(_with_optimizers, 2, engine)


@pytest.mark.parametrize(
    ("engine", "optimizer", "method"), [(engine, *case) for engine, cases in OPTIMIZERS_OF.items() for case in cases]
)
def test_optimizers(engine: str, optimizer: str, method: str) -> None:
    """Any elementwise torch optimizer under reflora, the Adam family (amsgrad's third moment too) under reflora-s."""
    kind, options = OPTIMIZERS[optimizer]
    expected = train_single(synthetic_workload(), RefLoRAConfig(method=method, warmup_steps=0), kind, **options)
    for trained in _trained_with_optimizers(engine):
        assert worst_factor_error(trained[optimizer, method], expected) < FACTOR_TOLERANCE


# --- sizes ------------------------------------------------------------------------------------------------------

# lora_alpha = 2 r keeps the update small beside the base; a large one makes attention saturate and training chaotic.
SIZES: dict[str, dict[str, Any]] = {
    # 5 x 40 elements do not divide by 3, 5 x 54 not by 4: pieces are uneven, rows of B are cut
    "uneven": {"llama": {"hidden_size": 40, "intermediate_size": 54}, "lora": {"r": 5}},
    # fewer rows of A than ranks: some ranks hold nothing of it
    "r-below-ranks": {"lora": {"r": 2, "lora_alpha": 4}},
    "r1": {"lora": {"r": 1, "lora_alpha": 2}},
    "mixed-ranks": {"lora": {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, "v_proj": 3, "down_proj": 8}}},
    # an embedding's factors are parameters of their own, lora_A [r, vocabulary]
    "embedding": {"lora": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]}},
    "few-adapters": {"lora": {"r": 3, "target_modules": ["v_proj"]}},
}


def _with_sizes(rank: int, world_size: int, engine: str, sizes: str, method: str) -> list[tuple[dict, list[int]]]:
    """With lora_A stored tall, and as PEFT stores it: the factors at the end, and what this rank held of each."""
    workload = synthetic_workload(**SIZES[sizes])
    if sizes == "r1":  # the builders make sure that no rank holds a whole factor, but one row cannot be split
        fsdp.assert_fsdp2_shards = lambda model: None
    results = []
    for tall in (True, False):
        model = build_model(workload)
        if tall:
            assert tall_adapters(model)
        wrapped = ENGINES[engine].wrap(model, Settings(), 12 // world_size)
        handle = attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(method=method, warmup_steps=0))
        recorder = CollectiveRecorder(handle)
        for batch in workload.batches:
            train_on(wrapped, batch)
        check_collectives(handle, recorder.steps)
        assert handle.report().skipped_pairs == 0
        results.append((wrapped.factors(), [weight.numel() for weight in handle._engine.weights()]))
    return results


def _cases(default: dict[str, int], further: dict[str, int], methods: list[str]) -> Iterator[Any]:
    """Engines with their ranks, and sizes: by default one for each engine and method."""
    for index, (engine, world_size) in enumerate({**default, **further}.items()):
        for (number, sizes), (turn, method) in itertools.product(enumerate(SIZES), enumerate(methods)):
            # where FSDP1 does not keep the original parameters, trained ones cannot share a module with frozen ones
            if (engine, sizes) != ("fsdp1-flat", "embedding"):
                chosen = engine in default and (index + number + 3 * turn) % len(SIZES) == 1
                marks = [] if chosen else [pytest.mark.all_ranks]
                name = f"{engine}-{world_size}-{sizes}-{method}".removesuffix("-")
                yield pytest.param(engine, world_size, sizes, *filter(None, [method]), marks=marks, id=name)


@pytest.mark.parametrize(
    ("engine", "world_size", "sizes", "method"),
    _cases(
        {"fsdp2": 4, "fsdp1-full": 3, "zero2": 4, "zero3": 4},
        {"zero1": 3, "zero2-round-robin": 3, "zero3-subgroups": 3, "fsdp1-flat": 3, "fsdp2-hsdp": 4},
        ["reflora", "reflora-s"],
    ),
)
def test_sizes(engine: str, world_size: int, sizes: str, method: str) -> None:
    """Uneven pieces, cut rows, ranks that hold nothing, pairs of several r: still what one process computes."""
    expected = train_single(synthetic_workload(**SIZES[sizes]), RefLoRAConfig(method=method, warmup_steps=0))
    results = run_ranks(_with_sizes, world_size, engine, sizes, method)
    for of_rank in results:
        for factors, _ in of_rank:
            assert worst_factor_error(factors, expected) < FACTOR_TOLERANCE
    if sizes == "r-below-ranks" and engine == "fsdp2":
        assert any(0 in held for _, (_, held) in results), "no rank was empty"


def _other_methods_with_sizes(rank: int, world_size: int, engine: str, sizes: str) -> list[dict[str, Any]]:
    workload = synthetic_workload(**SIZES[sizes])
    if sizes == "r1":
        fsdp.assert_fsdp2_shards = lambda model: None
    trained = []
    for (config, settings), tall in itertools.product(OTHER_METHODS, (True, False)):
        model = build_model(workload)
        if tall:
            assert tall_adapters(model)
        wrapped = ENGINES[engine].wrap(model, settings, 12 // world_size)
        handle = attach(wrapped.model, wrapped.optimizer, config)
        recorder = CollectiveRecorder(handle)
        for batch in workload.batches:
            train_on(wrapped, batch)
        check_collectives(handle, recorder.steps)
        assert handle.report().skipped_pairs == 0
        trained.append(wrapped.factors())
    return trained


OTHER_METHODS = [
    (RefLoRAConfig(method="lora-pro", warmup_steps=0), Settings()),
    (RefLoRAConfig(method="balora", warmup_steps=0, carry_moments=True), Settings()),
    (RefLoRAConfig(method="lora-rite"), Settings(rite={"apply_escape": True})),
    (RefLoRAConfig(method="lora-muon"), Settings(muon={})),
]


@pytest.mark.parametrize(
    ("engine", "world_size", "sizes"),
    _cases(
        {"fsdp2": 4},
        {"zero3": 4, "fsdp1-full": 3, "zero2": 4, "zero3-subgroups": 3, "fsdp1-flat": 3, "fsdp2-hsdp": 4},
        [""],
    ),
)
def test_sizes_of_other_methods(engine: str, world_size: int, sizes: str) -> None:
    """LoRA-Pro reads gradients, BaLoRA rewrites moments, LoRA-RITE's second moment lies at the head of the pieces."""
    workload = synthetic_workload(**SIZES[sizes])
    expected = [trained_in_float64(workload, settings, config)[1] for config, settings in OTHER_METHODS for _ in "12"]
    for trained in run_ranks(_other_methods_with_sizes, world_size, engine, sizes):
        errors = [worst_factor_error(factors, exact) for factors, exact in zip(trained, expected, strict=True)]
        assert max(errors) < FACTOR_TOLERANCE, errors


# --- features of the model and the engine -----------------------------------------------------------------------


def _with_feature(rank: int, world_size: int, engine: str, feature: str) -> dict[str, torch.Tensor]:
    workload = synthetic_workload()
    model = build_model(workload, gradient_checkpointing=feature == "hf-checkpointing")
    if engine != "ddp":  # as the package does where factors are sharded
        assert tall_adapters(model)
    if feature == "torch-checkpointing":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    if feature == "reentrant-checkpointing":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        model.base_model.model.enable_input_require_grads()
    accumulate = 3 if feature == "accumulation" else 1
    settings = dataclasses.replace(Settings(), grad_accum=accumulate)
    wrapped = ENGINES[engine].wrap(model, settings, 12 // world_size // accumulate)
    model = wrapped.model
    if feature == "compile":
        wrapped.model = torch.compile(model, backend="eager")
    handle = attach(wrapped.model, wrapped.optimizer, REFLORA)
    for batch in workload.batches:
        train_on(wrapped, batch)
    assert handle.report().steps == handle.report().applied_steps == len(workload.batches)
    wrapped.model = model
    return wrapped.factors()


FEATURES = ["hf-checkpointing", "reentrant-checkpointing", "torch-checkpointing", "accumulation", "compile"]


def _features() -> Iterator[Any]:
    """By default every engine with every second feature; torch.compile, which takes longest, with one."""
    for index, engine in enumerate(("ddp", "fsdp2", "fsdp1-full", "zero2", "zero3")):
        for number, feature in enumerate(FEATURES):
            chosen = engine == "fsdp2" if feature == "compile" else (index + number) % 2 == 0
            yield pytest.param(engine, feature, marks=[] if chosen else [pytest.mark.all_ranks])


@pytest.mark.parametrize(("engine", "feature"), _features())
def test_features(engine: str, feature: str) -> None:
    """Activation checkpointing of both kinds, accumulation, torch.compile: the same factors as without.

    Accumulation: S is applied once per optimizer step, to the same samples' mean gradient.
    """
    expected = train_single(synthetic_workload(), REFLORA)
    for factors in run_ranks(_with_feature, 2, engine, feature):
        assert worst_factor_error(factors, expected) < FACTOR_TOLERANCE


def _with_scaler(rank: int, world_size: int) -> tuple[dict[str, torch.Tensor], int]:
    """fp32 weights, loss scaled by 2^16 and, in step 2, an overflow that makes GradScaler leave the step out."""
    workload = synthetic_workload()
    wrapped: Wrapped = ENGINES["ddp"].wrap(build_model(workload), Settings(), 12 // world_size)
    wrapped.optimizer = torch.optim.AdamW(trainable(wrapped.model), **Settings().adamw())
    handle = attach(wrapped.model, wrapped.optimizer, REFLORA)
    scaler = torch.amp.GradScaler("cpu")
    for step, batch in enumerate(torch.cat([workload.batches[:1], workload.batches])):
        local = batch.chunk(world_size)[rank]
        scaler.scale(wrapped.model(input_ids=local, labels=local).loss).backward()
        if step == 0:
            trainable(wrapped.model)[0].grad.fill_(torch.inf)
        scaler.unscale_(wrapped.optimizer)
        scaler.step(wrapped.optimizer)
        scaler.update()
        wrapped.optimizer.zero_grad()
    return wrapped.factors(), handle.report().steps


def test_loss_scaling() -> None:
    """GradScaler unscales before the refactorization, and a step that it leaves out is not counted."""
    expected = train_single(synthetic_workload(), REFLORA)
    for factors, steps in run_ranks(_with_scaler, 2):
        assert worst_factor_error(factors, expected) < FACTOR_TOLERANCE
        assert steps == len(synthetic_workload().batches)


def _with_deepspeeds_scaler(rank: int, world_size: int, stage: int) -> tuple[int, int, int, float]:
    """fp16 under ZeRO from a loss scale of 2^28, far too large: DeepSpeed halves it and leaves those steps out."""
    workload = synthetic_workload()
    model = build_model(workload, dtype=torch.float16)
    scale = zero.fp16_config(initial_scale_power=28, hysteresis=1, loss_scale_window=1000)
    engine = ENGINES[f"zero{stage}"]
    wrapped: Any = functools.partial(engine.wrap, more=scale)(model, Settings(), 12 // world_size)
    handle = attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(method="reflora", warmup_steps=1))
    before, left_out = wrapped.factors(), 0
    for index, batch in enumerate(workload.batches):
        train_on(wrapped, batch)
        while wrapped.model.skipped_steps > left_out:
            left_out += 1
            assert all(torch.equal(factor, before[name]) for name, factor in wrapped.factors().items())
            assert handle.report().steps == index
            train_on(wrapped, batch)
        before = wrapped.factors()
    report = handle.report()
    expected = train_single(workload, RefLoRAConfig(method="reflora", warmup_steps=1))
    return left_out, report.steps, report.applied_steps, worst_factor_error(before, expected)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.all_ranks)])
def test_steps_that_deepspeed_leaves_out_are_not_counted(stage: int) -> None:
    """An overflow moves neither factors nor the warm-up; the steps after it are those of a run without one."""
    steps = len(synthetic_workload().batches)
    for left_out, counted, applied, error in run_ranks(_with_deepspeeds_scaler, 2, stage):
        assert left_out > 1
        assert (counted, applied) == (steps, steps - 1)
        assert error < (ENGINES[f"zero{stage}-fp16"].bf16_factor_tolerance or 0.0)


_UNUSED = ("reflora", "lora-pro", "lora-rite", "lora-muon")


def _unused_adapter(rank: int, world_size: int, engine: str) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """The last layer is not called: its adapters have no gradient on any rank."""
    workload, trained = synthetic_workload(), {}
    for method in _UNUSED:
        model = build_model(workload)
        model.base_model.model.model.layers[1] = Skipped(model.base_model.model.model.layers[1])
        settings = with_method(Settings(weight_decay=0.0), method)
        if method == "lora-muon":  # its rate is the norm of the product's step, most of which is B's here
            settings = dataclasses.replace(settings, lr=10 * settings.lr)
        wrapped = ENGINES[engine].wrap(model, settings, 12 // world_size)
        handle = attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(method=method, warmup_steps=0))
        for batch in workload.batches:
            train_on(wrapped, batch)
        trained[method] = wrapped.factors(), handle.report().num_pairs
    return trained


@functools.cache
def _trained_with_unused(engine: str) -> list[Any]:
    return run_ranks(_unused_adapter, 2, engine)


class Skipped(torch.nn.Module):
    """Holds a layer and leaves it out."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("method", _UNUSED)
@pytest.mark.parametrize(
    "engine", ["fsdp2", "zero3", *(pytest.param(name, marks=pytest.mark.all_ranks) for name in ("fsdp1-full", "zero2"))]
)
def test_adapters_without_gradients(engine: str, method: str) -> None:
    """An adapter that the forward does not reach keeps every rank in step and stays as it is; the others move."""
    start = synthetic_workload().initial_factors
    for factors, num_pairs in (trained[method] for trained in _trained_with_unused(engine)):
        assert num_pairs == 14
        for name, factor in factors.items():
            error = ((factor - start[name.replace(".1.layer.", ".1.")]).norm() / factor.norm()).item()
            assert error == 0.0 if ".1.layer." in name else 1e-3 < error < 1.0, (name, error)
