"""LoRA-SB under every engine: the gradient, the initialization, training, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reflora_dist.communication import Communicator
from reflora_dist.lora_sb import LoraXSLinear, initialize_lora_sb
from reflora_dist.lora_sb.gradients import mean_gradients
from tests.cluster import run_ranks
from tests.engines_under_test import ENGINES
from tests.engines_under_test.common import Wrapped
from tests.lora_xs import CONFIG, full_gradients, local_batches, xs_model
from tests.workloads import plain_name, synthetic_workload

GRADIENT_TOLERANCE = 2e-6  # fp32 sums over tokens in another order; measured 4e-7
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
    parts = run_ranks(_estimate, world_size, engine_name, checkpointing)
    assert parts[0].keys() == expected.keys()
    for name, gradient in expected.items():
        found = torch.cat([part[name] for part in parts])
        assert ((found - gradient).norm() / gradient.norm()).item() <= tolerance, name


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


_ = (CONFIG, initialize_lora_sb)
