"""lora_A stored tall on several ranks: what is told, checkpoints of the other storage; replicas that nobody keeps."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import RefLoRAConfig, attach, tall_adapters
from reflora_dist.checkpoints.training_state import load_checkpoint, save_checkpoint
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import Wrapped, train_on, trainable
from tests.support.refusals import CONFIG, adamw, message_of
from tests.support.workloads import Factors, Settings, build_model, synthetic_workload, with_method, worst_factor_error

# --- what comes too late ---


def _too_late(rank: int, world_size: int) -> list[str]:
    models = [build_model(synthetic_workload(steps=1)) for _ in range(2)]
    fully_shard(models[1])
    messages = [
        message_of(lambda: tall_adapters(DistributedDataParallel(models[0]))),
        message_of(lambda: tall_adapters(models[1])),
    ]
    for engine_name in ("fsdp1-full", "zero2", "zero3"):
        wrapped = ENGINES[engine_name].wrap(build_model(synthetic_workload(steps=1)), Settings(), 6)
        messages.append(message_of(lambda wrapped=wrapped: tall_adapters(wrapped.model)))
        messages.append(message_of(lambda wrapped=wrapped: tall_adapters(wrapped.bare)))
    return messages


def test_wrapped_and_sharded_models_are_refused() -> None:
    for messages in run_ranks(_too_late, 2):
        for message in messages:
            assert "tall_adapters() comes too late" in message and "before" in message.lower(), message


# --- what is told ---


def _warnings(rank: int, world_size: int, engine_name: str, tall: bool) -> str:
    model = build_model(synthetic_workload(steps=1))
    if tall:
        tall_adapters(model)
    wrapped = ENGINES[engine_name].wrap(model, Settings(), 6)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("reflora_dist").addHandler(handler)
    attach(wrapped.model, wrapped.optimizer, CONFIG)
    logging.getLogger("reflora_dist").removeHandler(handler)
    return stream.getvalue()


@pytest.mark.parametrize("engine_name", ["fsdp2", "zero3"])
def test_who_trains_flat_adapters_is_told_once(engine_name: str) -> None:
    """By the first rank: what moves, and what to call. Nothing where lora_A is stored tall."""
    first, second = run_ranks(_warnings, 2, engine_name, False)
    assert "14 of 14 lora_A are stored as [r, in] and cut by" in first and "tall_adapters(model)" in first
    assert "0.1 MB" in first  # 9,728 elements of four bytes, three times
    assert second == ""
    assert run_ranks(_warnings, 2, engine_name, True) == ["", ""]


# --- checkpoints of the other storage ---


def _wrap(engine_name: str, tall: bool, method: str = "reflora") -> tuple[Any, Wrapped]:
    workload = synthetic_workload(steps=4)
    model = build_model(workload)
    if tall:
        tall_adapters(model)
    settings = with_method(Settings(), method)
    return workload, ENGINES[engine_name].wrap(model, settings, 12 // dist.get_world_size())


def _config(method: str) -> RefLoRAConfig:
    return RefLoRAConfig(method=method, warmup_steps=0)


def _save(rank: int, world_size: int, engine_name: str, tall: bool, folder: str, method: str) -> Factors:
    workload, wrapped = _wrap(engine_name, tall, method)
    handle = attach(wrapped.model, wrapped.optimizer, _config(method))
    for step, batch in enumerate(workload.batches):
        if step == 2:
            save_checkpoint(folder, wrapped.model, wrapped.optimizer, handle)
        train_on(wrapped, batch)
    return wrapped.factors()


def _continue(rank: int, world_size: int, engine_name: str, tall: bool, folder: str, method: str) -> Any:
    workload, wrapped = _wrap(engine_name, tall, method)
    before = wrapped.factors()
    message = ""
    try:
        state = load_checkpoint(folder, wrapped.model, wrapped.optimizer)
    except ValueError as error:
        message = str(error)
        assert worst_factor_error(wrapped.factors(), before) == 0.0  # nothing was changed
        return message
    attach(wrapped.model, wrapped.optimizer, _config(method), state_dict=state)
    for batch in workload.batches[2:]:
        train_on(wrapped, batch)
    return wrapped.factors()


@pytest.mark.parametrize("saved_tall", [True, False])
@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 2, marks=pytest.mark.all_ranks), (2, 3)])
def test_fsdp2_continues_with_the_other_storage(saved_tall: bool, before: int, after: int, tmp_path: Path) -> None:
    """Adam's moments are transposed on the way: training ends where it would have."""
    folder = str(tmp_path / "checkpoint")
    expected = run_ranks(_save, before, "fsdp2", saved_tall, folder, "reflora")[0]
    for found in run_ranks(_continue, after, "fsdp2", not saved_tall, folder, "reflora"):
        assert worst_factor_error(found, expected) < 1e-5


@pytest.mark.parametrize("saved_tall", [True, False])
@pytest.mark.parametrize(
    ("engine_name", "method"),
    [
        ("zero3", "reflora"),
        pytest.param("zero2", "reflora", marks=pytest.mark.all_ranks),
        ("fsdp1-full", "reflora"),
        ("fsdp2", "lora-rite"),
    ],
)
def test_checkpoints_that_would_be_read_transposed_are_refused(
    engine_name: str, method: str, saved_tall: bool, tmp_path: Path
) -> None:
    """Flat buffers carry no shapes: DeepSpeed would load them, and train on with mixed up factors."""
    folder = str(tmp_path / "checkpoint")
    run_ranks(_save, 2, engine_name, saved_tall, folder, method)
    for message in run_ranks(_continue, 2, engine_name, not saved_tall, folder, method):
        assert f"stored {14 * saved_tall} lora_A tall" in message and "would be read transposed" in message


# --- replicas that nobody keeps equal ---


def _adapter_after_sharding(rank: int, world_size: int) -> str:
    workload = synthetic_workload(steps=1)
    base = LlamaForCausalLM(LlamaConfig(**workload.llama))
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**workload.lora))
    return _first_step(model, workload.batches[0].chunk(world_size)[rank])


def _nobody_wrapped(rank: int, world_size: int) -> str:
    workload = synthetic_workload(steps=1)
    return _first_step(build_model(workload), workload.batches[0].chunk(world_size)[rank])


def _wrapped_in_ddp(rank: int, world_size: int) -> str:
    workload = synthetic_workload(steps=1)
    model = DistributedDataParallel(build_model(workload))
    return _first_step(model, workload.batches[0].chunk(world_size)[rank])


def _first_step(model: nn.Module, batch: torch.Tensor) -> str:
    optimizer = adamw(model)
    attach(model, optimizer, CONFIG)
    model(input_ids=batch, labels=batch).loss.backward()
    before = [parameter.detach().clone() for parameter in trainable(model)]
    message = message_of(optimizer.step)
    unchanged = all(map(torch.equal, before, trainable(model)))
    assert unchanged == (message != "no error")  # refused before the update
    return message


@pytest.mark.parametrize("run", [_adapter_after_sharding, _nobody_wrapped])
def test_replicas_whose_gradients_nobody_reduces_are_refused(run: Any) -> None:
    for message in run_ranks(run, 2):
        assert "the gradients of the factors differ between ranks: nobody reduces them" in message
        assert "make the adapter first (get_peft_model), then shard" in message


def test_replicas_that_ddp_keeps_equal_go_on() -> None:
    assert run_ranks(_wrapped_in_ddp, 3) == ["no error"] * 3


def _counted(rank: int, world_size: int) -> list[dict[str, int]]:
    """The collectives of the first steps of a DDP run: the comparison is made once."""
    from tests.support.recorder import CollectiveRecorder

    workload = synthetic_workload(steps=2)
    model = DistributedDataParallel(build_model(workload))
    optimizer = adamw(model)
    recorder = CollectiveRecorder(attach(model, optimizer, CONFIG))
    for batch in workload.batches:
        part = batch.chunk(world_size)[rank]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [step.calls for step in recorder.steps]


def test_replicas_are_compared_once() -> None:
    assert run_ranks(_counted, 2) == [[{"all_reduce": 1}, {}]] * 2
