"""Stacked experts (PEFT's target_parameters): E pairs side by side, held to a model whose experts are layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoints.training_state import save_adapter
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.cluster import run_ranks
from tests.support.experts import (
    EXPERTS,
    backward,
    by_expert,
    expert_batches,
    expert_loss,
    expert_model,
    twin_of,
    wrap_experts,
)
from tests.support.small import trainable
from tests.support.workloads import Factors, Settings, named_factors

ACTING = [name for name, method in METHODS.items() if method.acts]
STEPS = 5


def _train(model: nn.Module, method: str, steps: int = STEPS, **settings: object) -> tuple[Factors, int]:
    kind = METHOD_OPTIMIZERS.get(method, torch.optim.AdamW)
    optimizer = kind(trainable(model), lr=3e-2)
    handle = attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=0, **settings))  # type: ignore[arg-type]
    for batch in expert_batches(steps):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    report = handle.report()
    assert report.num_pairs == 2 * EXPERTS
    return {name: each.detach().clone() for name, each in named_factors(model).items()}, report.skipped_pairs


@pytest.mark.parametrize("method", ACTING)
def test_each_expert_is_a_pair(method: str) -> None:
    """Also where an expert saw no token in a step."""
    model = expert_model()
    twin = twin_of(model)
    start = by_expert({name: each.detach().clone() for name, each in named_factors(model).items()})
    found, skipped = _train(model, method)
    expected, twins_skipped = _train(twin, method)
    apart = by_expert(found)
    assert apart.keys() == expected.keys() and skipped == twins_skipped
    for name, factor in expected.items():
        torch.testing.assert_close(apart[name], factor, rtol=1e-9, atol=1e-11)
        assert not torch.equal(factor, start[name])


def _settings(method: str) -> Settings:
    own: dict[str, Any] = {"lora-rite": {"rite": {}}, "lora-muon": {"muon": {}}}.get(method, {})
    return Settings(lr=1e-2, weight_decay=0.0, **own)


def _on_ranks(rank: int, world_size: int, engine_name: str, method: str, folder: Path) -> dict[str, Any]:
    wrapped = wrap_experts(engine_name, expert_model(dtype=torch.float32), _settings(method))
    handle = attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(method=method, warmup_steps=0))
    for batch in expert_batches(STEPS, torch.float32):
        wrapped.backward(expert_loss(wrapped.model, batch))
        wrapped.step()
    save_adapter(wrapped.model, folder)
    return handle.report().as_dict()


@pytest.mark.parametrize("method", ["reflora", "reflora-s", "lora-pro", "balora", "lora-rite", "lora-muon"])
@pytest.mark.parametrize("engine_name", ["ddp", "fsdp2", "fsdp2+tall", "fsdp1+tall", "zero2+tall", "zero3", "zero3+tall"])
def test_engines_follow_one_process(engine_name: str, method: str, tmp_path: Path) -> None:
    reports = run_ranks(_on_ranks, 2, engine_name, method, tmp_path)
    model = expert_model(dtype=torch.float32)
    optimizer = _settings(method).optimizer(trainable(model))
    handle = attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=0))
    for batch in expert_batches(STEPS, torch.float32):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, factor in named_factors(model).items():
        found = saved[name.replace(".default", "")]
        assert (found - factor).norm() <= 1e-4 * factor.norm(), name
    for report in reports:
        assert report["num_pairs"] == 2 * EXPERTS and report["skipped_pairs"] == handle.report().skipped_pairs
