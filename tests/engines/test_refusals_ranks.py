"""What bad input gets on several ranks: the same clear error on each of them, never a hang, before any update."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.engines.zero import _refuse_unsupported
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import train_on, trainable
from tests.support.launchers import micro_model
from tests.support.refusals import CONFIG, adamw, message_of
from tests.support.workloads import Settings, build_model, named_factors, synthetic_workload

DEEPSPEED = {"train_micro_batch_size_per_gpu": 6, "zero_allow_untested_optimizer": True}


def _different_configs(rank: int, world_size: int) -> str:
    model = DistributedDataParallel(build_model(synthetic_workload()))
    return message_of(lambda: attach(model, adamw(model), RefLoRAConfig(warmup_steps=10 * rank)))


def test_ranks_with_different_configs() -> None:
    """Refused on both ranks, not a hang."""
    for message in run_ranks(_different_configs, 2):
        assert "ranks disagree on the config" in message and "warmup_steps=10" in message


def _error_on_one_rank(rank: int, world_size: int) -> str:
    model = build_model(synthetic_workload())
    optimizer = adamw(model)
    if rank == 1:
        next(iter(named_factors(model).values())).requires_grad_(False)
    return message_of(lambda: attach(model, optimizer, CONFIG))


def test_error_on_one_rank_is_an_error_on_all() -> None:
    first, second = run_ranks(_error_on_one_rank, 2)
    assert first.startswith("ValueError: attach failed on rank 1: ValueError: lora_A of")
    assert second.startswith("ValueError: lora_A of")


def _replicas_that_differ(rank: int, world_size: int) -> str:
    model = build_model(synthetic_workload(seed=rank))
    return message_of(lambda: attach(model, adamw(model), CONFIG))


def test_replicas_that_differ() -> None:
    for message in run_ranks(_replicas_that_differ, 2):
        assert "should hold the same factors but do not" in message


def _wrapped_twice(rank: int, world_size: int) -> str:
    model = DistributedDataParallel(DistributedDataParallel(build_model(synthetic_workload())))
    return message_of(lambda: attach(model, adamw(model), CONFIG))


def test_model_wrapped_twice() -> None:
    for message in run_ranks(_wrapped_twice, 2):
        assert "wrapped more than once (DistributedDataParallel in DistributedDataParallel)" in message


def _optimizer_from_before_sharding(rank: int, world_size: int) -> str:
    model = build_model(synthetic_workload())
    optimizer = adamw(model)
    fully_shard(model)
    return message_of(lambda: attach(model, optimizer, CONFIG))


def test_optimizer_from_before_sharding() -> None:
    """PEFT's own Riemannian optimizer is silently off in this case."""
    for message in run_ranks(_optimizer_from_before_sharding, 2):
        assert "does not hold 28 of the factors" in message and "after wrapping" in message


def _sharded_after_attach(rank: int, world_size: int, engine: str) -> tuple[str, bool]:
    workload = synthetic_workload()
    model = build_model(workload)
    if engine == "fsdp2":
        handle_optimizer = adamw(model)
        attach(model, handle_optimizer, CONFIG)
        fully_shard(model)
        for group in handle_optimizer.param_groups:  # what accelerate does
            group["params"] = trainable(model)
        sharded = trainable(model)
        before = [p.to_local().clone() for p in sharded]
        model(input_ids=workload.batches[0], labels=workload.batches[0]).loss.backward()
        message = message_of(handle_optimizer.step)
        return message, all(torch.equal(p.to_local(), q) for p, q in zip(sharded, before, strict=True))
    import deepspeed

    optimizer = adamw(model)
    attach(model, optimizer, CONFIG)
    stage = int(engine[-1])
    config = {**DEEPSPEED, "zero_optimization": {"stage": stage}}
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    batch = workload.batches[0].chunk(world_size)[rank]
    wrapped.backward(wrapped(input_ids=batch, labels=batch).loss)
    zero = wrapped.optimizer
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    before = [master.detach().clone() for master in masters]
    message = message_of(wrapped.step)
    return message, all(torch.equal(p, q) for p, q in zip(masters, before, strict=True))


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_model_sharded_after_attach(engine: str) -> None:
    """Caught at the first step, before any update."""
    for message, untouched in run_ranks(_sharded_after_attach, 2, engine):
        assert "RuntimeError: the model was sharded or moved after attach()" in message or "rebuilt after" in message
        assert untouched


DEEPSPEED_REFUSALS = {
    "stage 0 bf16": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "set zero_optimization.stage to 1, 2 or 3"
    ),
}  # fmt: skip


def _deepspeed_option(rank: int, world_size: int, options: dict[str, Any]) -> str:
    import deepspeed

    model = build_model(synthetic_workload())
    optimizer = adamw(model)
    config = {**DEEPSPEED, **options}
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return message_of(lambda: attach(engine, zero, CONFIG))


@pytest.mark.parametrize("case", DEEPSPEED_REFUSALS)
def test_deepspeed_options_that_are_refused(case: str) -> None:
    options, expected = DEEPSPEED_REFUSALS[case]
    for message in run_ranks(_deepspeed_option, 2, options):
        assert message.startswith("ValueError") and expected in message


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"offload_optimizer": True, "partial_offload": 0.5}, "offload_optimizer.ratio=0.5"),
        ({"swap_optimizer": True}, "NVMe offload"),
        ({"params_in_nvme_and_cpu": True}, "NVMe offload"),
        ({"zenflow": True}, "zenflow"),
        ({"mpu": object()}, "tensor or pipeline"),
    ],
)
def test_deepspeed_options_that_cannot_be_started_here(attributes: dict[str, Any], message: str) -> None:
    """Told from the ZeRO optimizer's attributes; a stand-in has them, since the real thing needs more hardware."""
    with pytest.raises(ValueError, match=message):
        _refuse_unsupported("DeepSpeedZeroOptimizer_Stage3", SimpleNamespace(**attributes))


def _tensor_parallel(rank: int, world_size: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    model = build_model(synthetic_workload())
    for pair in find_pairs(model):
        for module in pair.factor_modules():
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0), Shard(0)]))
    return message_of(lambda: attach(model, adamw(model), CONFIG))


def test_tensor_parallel_adapters() -> None:
    for message in run_ranks(_tensor_parallel, 4):
        assert "Tensor parallelism of adapters is not" in message


def _tensor_parallel_base(rank: int, world_size: int, way: str, folder: Path) -> str:
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    if way == "tp_plan":
        os.environ["LOCAL_RANK"] = str(rank)  # which its launcher would set
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto"), lora)
        return message_of(lambda: attach(model, adamw(model), CONFIG))
    base = AutoModelForCausalLM.from_pretrained(folder)
    shape, names = {"torch": ((2,), ("model",)), "with-fsdp2": ((2, 2), ("data", "model"))}[way]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in base.model.layers:
        parallelize_module(layer.self_attn, mesh["model"], {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()})
    model = get_peft_model(base, lora)
    if way == "with-fsdp2":
        fully_shard(model, mesh=mesh["data"])
    return message_of(lambda: attach(model, adamw(model), CONFIG))


@pytest.mark.parametrize("way", ["tp_plan", "torch", pytest.param("with-fsdp2", marks=pytest.mark.all_ranks)])
def test_layers_that_tensor_parallelism_cuts(way: str, tmp_path: Path) -> None:
    """As accelerate's tp_size does, which takes a model that transformers has cut."""
    micro_model(tmp_path)
    for message in run_ranks(_tensor_parallel_base, 4 if way == "with-fsdp2" else 2, way, tmp_path):
        assert "is on a layer that tensor parallelism cuts" in message and "FSDP2 or ZeRO" in message


def test_layers_that_autotp_has_replaced() -> None:
    """A stand-in of DeepSpeed's layer; its initialize refuses PEFT's layers where this was written."""
    model = build_model(synthetic_workload())
    layer = next(iter(find_pairs(model))).layer
    replaced = type("LinearAllreduce", (nn.Linear,), {"__module__": "deepspeed.module_inject.layers"})
    layer.base_layer = replaced(layer.in_features, layer.out_features)
    with pytest.raises(ValueError, match=r"tensor parallelism cuts \(DeepSpeed's tensor_parallel.autotp_size\)"):
        attach(model, adamw(model), CONFIG)


def _plain_optimizer_under_zero3(rank: int, world_size: int) -> str:
    workload = synthetic_workload()
    model = build_model(workload)
    optimizer = adamw(model)
    ENGINES["zero3"].wrap(model, Settings(), 6)
    return message_of(lambda: attach(model, optimizer, CONFIG))


def test_plain_optimizer_under_zero3() -> None:
    for message in run_ranks(_plain_optimizer_under_zero3, 2):
        assert "partitioned by ZeRO-3 but the optimizer is a plain torch optimizer" in message


def _missing_from_zero(rank: int, world_size: int, stage: int) -> str:
    import deepspeed

    model = build_model(synthetic_workload())
    some = torch.optim.AdamW(list(named_factors(model).values())[:-2], lr=1e-3)
    config = {**DEEPSPEED, "zero_optimization": {"stage": stage}}
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=some, config=config)
    return message_of(lambda: attach(engine, zero, CONFIG))


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_that_does_not_hold_a_factor(stage: int) -> None:
    for message in run_ranks(_missing_from_zero, 2, stage):
        assert "does not hold" in message and "down_proj" in message


def _lora_b_by_columns(rank: int, world_size: int) -> str:
    model = build_model(synthetic_workload())
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] == 8 else Shard(0))
    return message_of(lambda: attach(model, adamw(model), CONFIG))


def test_lora_b_sharded_by_columns() -> None:
    for message in run_ranks(_lora_b_by_columns, 2):
        assert "lora_B of shape (64, 8) is sharded on dim 1; shard it on dim 0" in message


def _detached(rank: int, world_size: int) -> bool:
    workload = synthetic_workload()
    wrapped = ENGINES["fsdp2"].wrap(build_model(workload), Settings(), 6)
    handle = attach(wrapped.model, wrapped.optimizer, CONFIG)
    handle.detach()
    train_on(wrapped, workload.batches[0])
    dist.barrier()
    return handle.report().steps == 0


def test_detached_handle_does_nothing() -> None:
    assert all(run_ranks(_detached, 2))
