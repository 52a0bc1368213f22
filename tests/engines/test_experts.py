"""Stacked experts (PEFT's target_parameters): E pairs side by side, held to a model whose experts are layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from reflora_dist import Handle, RefLoRAConfig, attach
from reflora_dist.checkpoints.training_state import load_checkpoint, save_adapter, save_checkpoint
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.checkpoints import convert_to_universal
from tests.support.cluster import run_ranks
from tests.support.experts import (
    EXPERTS,
    LORA_RANK,
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
    assert skipped == 0 or method == "lora-rite"  # which leaves out gradients that are too large
    for name, factor in expected.items():
        torch.testing.assert_close(apart[name], factor, rtol=1e-9, atol=1e-11)
        assert not torch.equal(factor, start[name])


@pytest.mark.parametrize("method", ["reflora", "lora-pro", "balora"])
def test_one_expert_of_deficient_rank_is_counted_and_the_others_are_not(method: str) -> None:
    """It stays so in one step only, since plain LoRA gives its lora_B a gradient."""
    model = expert_model()
    with torch.no_grad():
        named_factors(model)["base_model.model.up.lora_B.default.weight"][:, 2::EXPERTS] = 0
    twin = twin_of(model)
    found, skipped = _train(model, method, steps=2)
    expected, twins_skipped = _train(twin, method, steps=2)
    assert skipped == twins_skipped >= 1
    apart = by_expert(found)
    for name, factor in expected.items():
        torch.testing.assert_close(apart[name], factor, rtol=1e-9, atol=1e-11)


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


def _trained_in_one_process(method: str) -> tuple[Any, Handle]:
    model = expert_model(dtype=torch.float32)
    optimizer = _settings(method).optimizer(trainable(model))
    handle = attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=0))
    for batch in expert_batches(STEPS, torch.float32):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    return model, handle


_DEFAULT = {
    *(("fsdp2+tall", method) for method in ("reflora", "lora-rite")),
    *(("zero3+tall", method) for method in ("reflora", "lora-muon")),
    *(("zero3", "reflora-s"), ("zero2+tall", "balora")),
}


def _cases() -> Iterator[Any]:
    for engine in ("ddp", "fsdp2", "fsdp2+tall", "zero1+tall", "zero2+tall", "zero3", "zero3+tall"):
        for method in ("reflora", "reflora-s", "lora-pro", "balora", "lora-rite", "lora-muon"):
            marks = [] if (engine, method) in _DEFAULT else [pytest.mark.all_ranks]
            yield pytest.param(engine, method, marks=marks, id=f"{engine}-{method}")


@pytest.mark.parametrize(("engine_name", "method"), _cases())
def test_engines_follow_one_process(engine_name: str, method: str, tmp_path: Path) -> None:
    reports = run_ranks(_on_ranks, 2, engine_name, method, tmp_path)
    model, handle = _trained_in_one_process(method)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, factor in named_factors(model).items():
        found = saved[name.replace(".default", "")]
        assert (found - factor).norm() <= 1e-4 * factor.norm(), name
    for report in reports:
        assert report["num_pairs"] == 2 * EXPERTS and report["skipped_pairs"] == handle.report().skipped_pairs
        if (engine_name, method) == ("fsdp2+tall", "reflora"):  # no row is cut: two triangles per expert, in float64
            assert report["collectives_per_step"] == {"all_reduce": 1}
            assert report["bytes_per_step"] == 2 * EXPERTS * LORA_RANK * (LORA_RANK + 1) * 8


def _resumed(rank: int, world_size: int, engine_name: str, method: str, folder: Path) -> None:
    batches = expert_batches(STEPS, torch.float32)
    config = RefLoRAConfig(method=method, warmup_steps=0)

    def train(batches: list[Any], saved: str | None = None, load: str | None = None) -> None:
        wrapped = wrap_experts(engine_name, expert_model(dtype=torch.float32), _settings(method))
        state = load_checkpoint(folder / load, wrapped.model, wrapped.optimizer) if load else None
        handle = attach(wrapped.model, wrapped.optimizer, config, state_dict=state)
        for batch in batches:
            wrapped.backward(expert_loss(wrapped.model, batch))
            wrapped.step()
        if saved:
            save_checkpoint(folder / saved, wrapped.model, wrapped.optimizer, handle)
        else:
            save_adapter(wrapped.model, folder / ("resumed" if load else "whole"))

    train(batches)
    train(batches[:3], saved="checkpoint")
    train(batches[3:], load="checkpoint")


@pytest.mark.parametrize("method", ["reflora", pytest.param("lora-rite", marks=pytest.mark.all_ranks)])
@pytest.mark.parametrize("engine_name", ["fsdp2+tall", "zero3+tall"])
def test_training_resumes(engine_name: str, method: str, tmp_path: Path) -> None:
    run_ranks(_resumed, 2, engine_name, method, tmp_path)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    for name, factor in whole.items():
        torch.testing.assert_close(resumed[name], factor, rtol=1e-6, atol=1e-7)


def _until_or_from(rank: int, world_size: int, engine_name: str, method: str, folder: Path, load: bool) -> None:
    more = {"checkpoint": {"load_universal": True}} if load and engine_name.startswith("zero") else None
    wrapped = wrap_experts(engine_name, expert_model(dtype=torch.float32), _settings(method), more)
    state = load_checkpoint(folder / "checkpoint", wrapped.model, wrapped.optimizer) if load else None
    config = RefLoRAConfig(method=method, warmup_steps=0)
    handle = attach(wrapped.model, wrapped.optimizer, config, state_dict=state)
    batches = expert_batches(STEPS, torch.float32)
    for batch in batches[3:] if load else batches[:3]:
        wrapped.backward(expert_loss(wrapped.model, batch))
        wrapped.step()
    if load:
        save_adapter(wrapped.model, folder)
    else:
        save_checkpoint(folder / "checkpoint", wrapped.model, wrapped.optimizer, handle)


def _on_other_ranks() -> Iterator[Any]:
    for engine in ("fsdp2+tall", "zero3+tall", "zero2+tall", "zero1+tall", "zero3"):
        for method in ("reflora", "lora-rite"):
            marks = [] if (engine, method) == ("zero3+tall", "reflora") else [pytest.mark.all_ranks]
            yield pytest.param(engine, method, marks=marks)


@pytest.mark.parametrize(("engine_name", "method"), _on_other_ranks())
def test_training_resumes_on_another_number_of_ranks(engine_name: str, method: str, tmp_path: Path) -> None:
    """Under ZeRO from DeepSpeed's universal checkpoint."""
    run_ranks(_until_or_from, 2, engine_name, method, tmp_path, False)
    if engine_name.startswith("zero"):
        convert_to_universal(tmp_path / "checkpoint")
    run_ranks(_until_or_from, 3, engine_name, method, tmp_path, True)
    model, _ = _trained_in_one_process(method)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, factor in named_factors(model).items():
        assert (saved[name.replace(".default", "")] - factor).norm() <= 1e-4 * factor.norm(), name


def _fsdp1(rank: int, world_size: int) -> list[str]:
    wrapped = wrap_experts("fsdp1", expert_model(dtype=torch.float32), Settings())
    messages = []
    for act in (
        lambda: attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(warmup_steps=0)),
        lambda: expert_loss(wrapped.model, expert_batches(1, torch.float32)[0]).backward(),
    ):
        try:
            act()
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return messages


def test_fsdp1_is_refused_since_peft_cannot_run_there() -> None:
    refused, peft = run_ranks(_fsdp1, 2)[0]
    assert "adapts a parameter (target_parameters)" in refused and "use FSDP2" in refused
    assert "modified inplace" in peft, "PEFT's forward runs under FSDP1 by now: allow it"
