"""A run that continues with another adapter, optimizer or settings than it had: told before it trains."""

from __future__ import annotations

import copy
import dataclasses
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict

from reflora_dist import LoRARite, RefLoRAConfig, attach
from reflora_dist.checkpoints.errors import named_load_errors
from reflora_dist.checkpoints.training_state import load_checkpoint, save_checkpoint
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import train_on
from tests.support.small import backward, small_batches, small_model, train_small, trainable
from tests.support.workloads import build_model, synthetic_workload

CONFIG = RefLoRAConfig(warmup_steps=0)
OTHER_ADAPTERS: list[dict[str, Any]] = [
    {"lora_alpha": 12},
    {"use_rslora": True},
    {"target_modules": ["first"]},
    {"target_modules": ["first", "head"]},
    {"r": 2, "lora_alpha": 4},
]


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def _saved(folder: Path, **lora: Any) -> dict[str, Any]:
    """Train a step and save; the handle's state."""
    model = small_model(**lora)
    optimizer = _adamw(model)
    handle = attach(model, optimizer, CONFIG)
    train_small(model, optimizer, small_batches(1))
    save_checkpoint(folder, model, optimizer, handle)
    return handle.state_dict()


@pytest.mark.parametrize("other", OTHER_ADAPTERS, ids=lambda other: "-".join(map(str, other)))
def test_another_adapter_does_not_continue_a_run(other: dict[str, Any], tmp_path: Path) -> None:
    """Neither from a checkpoint, where the model stays as it is, nor from a state that the caller keeps."""
    state = _saved(tmp_path / "checkpoint")
    model = small_model(seed=5, **other)
    optimizer = _adamw(model)
    before = copy.deepcopy(model.state_dict())
    message = (
        "other layers" if other == {"target_modules": ["first", "head"]} else r"2 adapters \(r=3, scaling=2\), and"
    )
    with pytest.raises(ValueError, match=f"checkpoint is of .*{message}"):
        load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"give LoraConfig the .*target_modules"):
        attach(model, optimizer, CONFIG, state_dict=state)


class _Around(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


def test_a_module_around_the_model_is_no_other_adapter(tmp_path: Path) -> None:
    """Whether attach, or saving, was given the model or what it is in."""
    model = small_model()
    optimizer = _adamw(model)
    handle = attach(model, optimizer, CONFIG)
    save_checkpoint(tmp_path / "checkpoint", _Around(model), optimizer, handle)
    handle.detach()
    state = load_checkpoint(tmp_path / "checkpoint", _Around(model), optimizer)
    attach(_Around(model), optimizer, CONFIG, state_dict=state)


def test_the_order_of_adapters_does_not_matter() -> None:
    model = small_model()
    model.add_adapter("other", model.peft_config["default"])
    states = []
    for order in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(order)
        optimizer = _adamw(model.double())
        handle = attach(model, optimizer, RefLoRAConfig(), state_dict=states[0] if states else None)
        states.append(handle.state_dict())
        handle.detach()


def test_other_settings_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = _saved(tmp_path / "checkpoint")
    model = small_model()
    with caplog.at_level(logging.WARNING, "reflora_dist"):
        handle = attach(model, _adamw(model), RefLoRAConfig(warmup_steps=50), state_dict=state)
        handle.detach()
        state["config"]["overlap"] = True  # an option of an earlier release
        attach(model, _adamw(model), RefLoRAConfig(warmup_steps=0), state_dict=state)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("reflora_dist")] == [
        "the run goes on with other settings than it was saved with: warmup_steps=50 in place of 0"
    ]


def test_a_checkpoint_without_a_handle_has_no_state_for_one(tmp_path: Path) -> None:
    model = small_model()
    optimizer = _adamw(model)
    train_small(model, optimizer, small_batches(1))
    save_checkpoint(tmp_path / "checkpoint", model, optimizer)
    state = load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    with pytest.raises(ValueError, match="saved without a handle, so leave state_dict out"):
        attach(model, optimizer, CONFIG, state_dict=state)


def test_another_optimizer_is_named(tmp_path: Path) -> None:
    """DCP's own exception is none that `except Exception` catches, and shows the ranks' tracebacks."""
    model = small_model()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    train_small(model, optimizer, small_batches(1))
    save_checkpoint(tmp_path / "checkpoint", model, optimizer)
    with pytest.raises(RuntimeError, match=r"does not fit this run .*optimizer and its groups as in the run"):
        load_checkpoint(tmp_path / "checkpoint", model, _adamw(model))


def test_what_cannot_be_read_keeps_its_name(tmp_path: Path) -> None:
    """It is no matter of adapters and optimizers."""
    for kind in (OSError, torch.OutOfMemoryError):
        with pytest.raises(kind, match="disk"), named_load_errors(tmp_path):
            raise kind("disk")
        failure = (kind("disk"), traceback.StackSummary.from_list([]))
        with pytest.raises(kind, match="disk"), named_load_errors(tmp_path):
            raise CheckpointException("", {0: failure})


def test_lora_plus_continues(tmp_path: Path) -> None:
    """PEFT makes four groups of which two are empty here; they stay, and the run is that without interruption."""
    factors = []
    for resumed in (False, True):
        model = small_model()
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8)
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        assert 0 in sizes
        state = None
        if resumed:
            state = load_checkpoint(tmp_path / "checkpoint", model, optimizer)
        handle = attach(model, optimizer, CONFIG, state_dict=state)
        batches = small_batches(4)
        if not resumed:
            train_small(model, optimizer, batches[:2])
            save_checkpoint(tmp_path / "checkpoint", model, optimizer, handle)
        assert [len(group["params"]) for group in optimizer.param_groups] == sizes
        factors.append(train_small(model, optimizer, batches[2:]))
    assert all(torch.equal(factors[0][name], factors[1][name]) for name in factors[0])


def test_torch_filling_the_optimizers_state_is_no_step() -> None:
    """As torch's recipe for checkpoints does before the first step."""
    model = small_model()
    optimizer = _adamw(model)
    handle = attach(model, optimizer, RefLoRAConfig(method="reflora-s", warmup_steps=1))
    get_state_dict(model, optimizer)
    assert optimizer.state and handle.report().steps == 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a warm-up of the learning rate begins so
    train_small(model, optimizer, small_batches(1))
    assert handle.report().steps == 1


def _give_adamws_moments_to_lora_rite(rank: int, world_size: int, engine_name: str, folder: Path) -> str:
    workload = synthetic_workload(steps=1)
    message = "nothing"
    for rite in (None, {}):
        settings = dataclasses.replace(workload.settings, rite=rite)
        model = build_model(workload)
        wrapped = ENGINES[engine_name].wrap(model, settings, workload.batches.shape[1] // world_size)
        if rite is None:
            train_on(wrapped, workload.batches[0])
            save_checkpoint(folder, wrapped.model, wrapped.optimizer)
            continue
        load_checkpoint(folder, wrapped.model, wrapped.optimizer)
        try:
            attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(method="lora-rite"))
        except (RuntimeError, ValueError) as error:
            message = str(error)
    return message


@pytest.mark.parametrize(
    "engine_name", ["ddp", "zero3", *(pytest.param(name, marks=pytest.mark.all_ranks) for name in ("fsdp2", "zero2"))]
)
def test_lora_rite_does_not_take_adamws_moments(engine_name: str, tmp_path: Path) -> None:
    """They have the same names, and elementwise second moments read as packed matrices make steps far too long."""
    for message in run_ranks(_give_adamws_moments_to_lora_rite, 2, engine_name, tmp_path / "checkpoint"):
        assert "the optimizer's state is that of another optimizer" in message


def test_lora_rite_takes_its_own_moments() -> None:
    model = small_model()
    optimizer = LoRARite(trainable(model), lr=1e-2)
    config = RefLoRAConfig(method="lora-rite")
    handle = attach(model, optimizer, config)
    train_small(model, optimizer, small_batches(2))
    handle.detach()
    attach(model, optimizer, config)
    backward(model, small_batches(1)[0])
    optimizer.step()
