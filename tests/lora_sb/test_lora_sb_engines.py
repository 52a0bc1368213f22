"""LoRA-SB under every engine: the gradient, the initialization, training, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from reflora_dist.checkpoints.training_state import load_checkpoint, save_adapter, save_checkpoint
from reflora_dist.collectives.communicator import Communicator
from reflora_dist.lora_sb import LoraXSLinear, initialize_lora_sb, initialize_lora_xs
from reflora_dist.lora_sb.gradients import mean_gradients
from tests.support.checkpoints import assert_no_frozen_base
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import Wrapped, mean_over_ranks, train_on
from tests.support.lora_xs import CONFIG, full_gradients, local_batches, xs_model
from tests.support.workloads import Workload, plain_name, synthetic_workload

GRADIENT_TOLERANCE = 2e-6  # fp32 sums over tokens in another order; measured 4e-7
START_TOLERANCE = 1e-4
TRAINED_TOLERANCE = 1e-3
RESUMED_TOLERANCE = 1e-6  # DDP and ZeRO-1/2 cut their first step's buckets differently
SAVED_AT = 3
BF16_TOLERANCE = 5e-2  # activations and their gradients are rounded to 8 bits


def _engines() -> Iterator[Any]:
    default = {("single", 1), ("ddp", 3), ("fsdp2", 3), ("fsdp1-full", 2), ("fsdp1-flat", 2), ("fsdp2-bf16", 2)}
    default |= {("zero1", 2), ("zero2", 2), ("zero3", 3), ("zero3-persist-none", 2), ("zero2-bf16-masters", 2)}
    names = ("single", "ddp", "fsdp2", "fsdp2-offload", "fsdp2-hsdp", "fsdp1-full", "fsdp1-grad-op", "fsdp1-no-shard")
    names += ("fsdp1-flat", "zero1", "zero2", "zero3", "zero3-persist-none", "zero3-persist-all", "zero3-subgroups")
    names += ("zero3-sharded-base", "fsdp2-bf16", "zero2-bf16-masters", "zero3-bf16-masters", "zero1-bf16")
    for name in names:
        for world_size in set(ENGINES[name].world_sizes) & {1, 2, 3, 4}:
            marks = [] if (name, world_size) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, world_size, marks=marks, id=f"{name}-{world_size}")


def _wrap(engine_name: str, rank: int, world_size: int, gradient_checkpointing: bool = False) -> tuple[Any, Wrapped]:
    workload = synthetic_workload(steps=6)
    engine = ENGINES[engine_name]
    model = xs_model(workload, dtype=engine.model_dtype, gradient_checkpointing=gradient_checkpointing)
    return workload, engine.wrap(model, workload.settings, workload.batches.shape[1] // world_size)


def _layers(model: nn.Module) -> dict[str, LoraXSLinear]:
    named = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, LoraXSLinear)}
    return {name.removeprefix("base_model.model."): module for name, module in named.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize(("engine_name", "world_size"), _engines())
def test_gradients_are_those_of_autograd(engine_name: str, world_size: int, checkpointing: bool) -> None:
    """Every weight's rows, put together, are the gradient that full fine-tuning computes in one process, also with
    activations recomputed; no gradient and no change of what is trained remains.
    """
    expected = full_gradients(synthetic_workload(steps=6))
    tolerance = BF16_TOLERANCE if "bf16" in engine_name else GRADIENT_TOLERANCE
    parts = [of_rank[checkpointing] for of_rank in _estimates(world_size, engine_name)]
    assert parts[0].keys() == expected.keys()
    for name, gradient in expected.items():
        found = torch.cat([part[name] for part in parts])
        assert ((found - gradient).norm() / gradient.norm()).item() <= tolerance, name


@functools.cache
def _estimates(world_size: int, engine_name: str) -> list[list[dict[str, Tensor]]]:
    """Of every rank, without recomputation and with it."""
    return run_ranks(_estimate_both, world_size, engine_name)


def _estimate_both(rank: int, world_size: int, engine_name: str) -> list[dict[str, Tensor]]:
    return [_estimate(rank, world_size, engine_name, checkpointing) for checkpointing in (False, True)]


def _estimate(rank: int, world_size: int, engine_name: str, checkpointing: bool) -> dict[str, Tensor]:
    workload, wrapped = _wrap(engine_name, rank, world_size, checkpointing)
    before = wrapped.factors()
    trained = {name for name, parameter in wrapped.model.named_parameters() if parameter.requires_grad}
    layers = _layers(wrapped.model)
    group = dist.group.WORLD if world_size > 1 else None
    comm = Communicator(group, torch.device("cpu"))
    state = torch.get_rng_state()
    batches = local_batches(workload, rank, world_size)
    rows = mean_gradients(wrapped.model, list(layers.values()), batches, _loss, comm)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in wrapped.model.parameters())
    assert {name for name, parameter in wrapped.model.named_parameters() if parameter.requires_grad} == trained
    assert all(torch.equal(factor, before[name]) for name, factor in wrapped.factors().items())
    return dict(zip(layers, rows, strict=True))


def _loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


class Outcome(NamedTuple):
    """What a rank saw: the adapter's files at the start and at the end, and the losses after the checkpoint."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    losses: list[float]


def _initialize(wrapped: Wrapped, workload: Workload, rank: int, world_size: int, method: str) -> None:
    config = dataclasses.replace(CONFIG, method=method)
    if method == "lora-xs":
        initialize_lora_xs(wrapped.model, wrapped.optimizer, config)
    else:
        batches = local_batches(workload, rank, world_size)
        initialize_lora_sb(wrapped.model, wrapped.optimizer, batches, config)
    assert all(parameter.grad is None for parameter in wrapped.model.parameters())


def _train(rank: int, world_size: int, engine_name: str, method: str, folder: str) -> Outcome:
    """Initialize, train, save a checkpoint on the way, train to the end."""
    workload, wrapped = _wrap(engine_name, rank, world_size)
    _initialize(wrapped, workload, rank, world_size, method)
    save_adapter(wrapped.model, f"{folder}/start")
    losses = []
    for step, batch in enumerate(workload.batches):
        if step == SAVED_AT:
            save_checkpoint(f"{folder}/checkpoint", wrapped.model, wrapped.optimizer)
        losses.append(train_on(wrapped, batch))
    return _outcome(wrapped, folder, losses[SAVED_AT:])


def _resume(rank: int, world_size: int, engine_name: str, folder: str) -> Outcome:
    """A model made as for a new run, whose A and B are others until it is loaded."""
    workload, wrapped = _wrap(engine_name, rank, world_size)
    assert load_checkpoint(f"{folder}/checkpoint", wrapped.model, wrapped.optimizer) == {}
    if hasattr(wrapped.model, "micro_steps"):
        wrapped.model.micro_steps = wrapped.model.global_steps  # DeepSpeed starts it anew; the harness compares
    return _outcome(wrapped, folder, [train_on(wrapped, batch) for batch in workload.batches[SAVED_AT:]])


def _outcome(wrapped: Wrapped, folder: str, losses: list[float]) -> Outcome:
    save_adapter(wrapped.model, f"{folder}/end")
    start, end = (load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("start", "end"))
    return Outcome(start, end, mean_over_ranks(losses))


def _training_cases() -> Iterator[Any]:
    default = {("single", "lora-sb"), ("ddp", "lora-sb"), ("fsdp2", "lora-sb")}
    default |= {("fsdp1-full", "lora-sb"), ("fsdp1-flat", "lora-xs"), ("zero1", "lora-sb"), ("zero2", "lora-xs")}
    default |= {("zero3", "lora-sb"), ("zero3-persist-none", "lora-xs")}
    names = ("single", "ddp", "fsdp2", "fsdp2-offload", "fsdp2-hsdp", "fsdp1-full", "fsdp1-grad-op", "fsdp1-no-shard")
    names += ("fsdp1-flat", "zero1", "zero2", "zero3", "zero3-persist-none", "zero3-persist-all", "zero3-subgroups")
    names += ("zero3-sharded-base", "zero2-offload", "zero3-offload")
    for name in names:
        for method in ("lora-sb", "lora-xs"):
            for world_size in ENGINES[name].world_sizes:
                usual = (name, method) in default and world_size == ENGINES[name].world_sizes[-1 if "2" in name else 0]
                marks = [] if usual else [pytest.mark.all_ranks]
                yield pytest.param(name, method, world_size, marks=marks, id=f"{name}-{method}-{world_size}")


@functools.lru_cache
def _expected(method: str) -> Outcome:
    """The same training in one process."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(_train, 1, "single", method, folder)[0]


@pytest.mark.parametrize(("engine_name", "method", "world_size"), _training_cases())
def test_training_follows_one_process_and_resumes(
    engine_name: str, method: str, world_size: int, tmp_path: Path
) -> None:
    """The initialization and the trained adapter are those of one process, A and B do not move, and a run resumed
    from a checkpoint, which holds no frozen weight of the base, ends as the one that was not interrupted.
    """
    expected = _expected(method)
    complete = run_ranks(_train, world_size, engine_name, method, str(tmp_path))[0]
    for key, tensor in expected.start.items():
        assert complete.start[key].shape == tensor.shape
        assert _error(complete.start[key], tensor) <= START_TOLERANCE, key
        if ".lora_xs_R." not in key:
            assert torch.equal(complete.end[key], complete.start[key]), key
        assert _error(complete.end[key], expected.end[key]) <= TRAINED_TOLERANCE, key
    moved = [key for key in expected.start if not torch.equal(complete.end[key], complete.start[key])]
    assert moved and all(".lora_xs_R." in key for key in moved)
    assert_no_frozen_base(tmp_path / "checkpoint")
    resumed = run_ranks(_resume, world_size, engine_name, str(tmp_path))[0]
    for key, tensor in complete.end.items():
        assert _error(resumed.end[key], tensor) <= RESUMED_TOLERANCE, key
    for loss, reference in zip(resumed.losses, complete.losses, strict=True):
        assert abs(loss - reference) <= RESUMED_TOLERANCE * reference


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()
