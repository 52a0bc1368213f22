"""FSDP2 (``fully_shard``) and FSDP1 (``FullyShardedDataParallel``) as torch gives them."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.support.engines_under_test.common import DEVICE, Engine, Wrapped, copied, optimizer_of, world_size
from tests.support.workloads import Factors, Settings, as_peft_names_them, named_factors, plain_name


class Fsdp2(Wrapped):
    """Parameters are DTensors; the model is the PEFT model itself, so bare and wrapped are one object."""

    def accumulation_context(self, is_last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def factors(self) -> Factors:
        return gathered_by_fsdp2(self.model)


class Fsdp1(Wrapped):
    """Parameters are pieces of flat buffers; gathering and clipping are methods of the wrapper."""

    def accumulation_context(self, is_last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if is_last else self.model.no_sync()

    def clip(self) -> None:
        self.model.clip_grad_norm_(self.settings.clip)

    def factors(self) -> Factors:
        return gathered_by_fsdp1(self.model)


def gathered_by_fsdp2(model: nn.Module) -> Factors:
    # a copy: a gathered tensor may share the memory of a replicated one
    whole = {name: _in_host_memory(f).full_tensor().detach().clone() for name, f in named_factors(model).items()}
    return as_peft_names_them(whole)


def _in_host_memory(factor: DTensor) -> DTensor:
    """The same shards there: in torch 2.11 full_tensor() of CUDA tensors over gloo ends the process."""
    mesh = factor.device_mesh
    if mesh.device_type == "cpu":
        return factor
    mesh = _host_mesh(tuple(mesh.shape))
    local = factor.to_local().detach().cpu()
    return DTensor.from_local(
        local, mesh, factor.placements, run_check=False, shape=factor.shape, stride=factor.stride()
    )


@functools.cache
def _host_mesh(shape: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", shape)


def gathered_by_fsdp1(model: nn.Module) -> Factors:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return copied(named_factors(model))


def assert_fsdp2_shards(model: nn.Module) -> None:
    """Every factor is a DTensor split along one mesh axis; what looks sharded but is not must fail."""
    for name, factor in named_factors(model).items():
        assert isinstance(factor, DTensor), f"{name} is a plain {type(factor).__name__}"
        assert any(isinstance(placement, Shard) for placement in factor.placements), (name, factor.placements)
        axis = next(i for i, placement in enumerate(factor.placements) if isinstance(placement, Shard))
        if factor.device_mesh.size(axis) > 1:
            assert factor.to_local().numel() < factor.numel(), f"{name} is whole on this rank"


def assert_fsdp1_shards(model: nn.Module, *, whole: bool = False) -> None:
    """This rank's flat parameters hold a part of all trainable elements (all of them where ``whole``)."""
    units = FullyShardedDataParallel.fsdp_modules(model)
    assert units, "no FSDP unit: the model was not wrapped"
    local = sum(unit._handle.flat_param.numel() for unit in units if unit._handle is not None)
    full = sum(unit._handle.flat_param._unpadded_unsharded_size.numel() for unit in units if unit._handle)
    ranks = 1 if whole else units[0].process_group.size()
    assert full / ranks <= local <= full / ranks + 64 * len(units), (full, local, ranks)
    if not whole and ranks > 1:
        assert local < full, "the flat parameters are whole on this rank"


def _fsdp2(
    model: nn.Module,
    settings: Settings,
    micro_batch_size: int,
    *,
    columns_of_a: bool = False,
    hybrid: bool = False,
    offload: bool = False,
    bf16: bool = False,
) -> Wrapped:
    """FSDP2 per decoder layer; ``bf16`` computes and reduces in it, over fp32 shards."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if ".lora_A." in names[id(parameter)] else None

    mesh = _hybrid_mesh() if hybrid else init_device_mesh(DEVICE.type, (world_size(),), mesh_dim_names=("shard",))
    arguments: dict[str, Any] = {"mesh": mesh}
    if columns_of_a:
        arguments["shard_placement_fn"] = placement
    if offload:
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if bf16:
        arguments["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, **arguments)
    fully_shard(model, **arguments)
    assert_fsdp2_shards(model)
    for name, factor in named_factors(model).items():
        expected = Shard(1) if columns_of_a and ".lora_A." in name else Shard(0)
        assert factor.placements == ((Replicate(), expected) if hybrid else (expected,)), (
            name,
            factor.placements,
        )
    return Fsdp2(model, optimizer_of(model, settings), settings)


def _hybrid_mesh() -> Any:
    return init_device_mesh(DEVICE.type, (world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))


def _fsdp1(
    model: nn.Module,
    settings: Settings,
    micro_batch_size: int,
    *,
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD,
    flat: bool = False,
    bf16: bool = False,
) -> Wrapped:
    """FSDP1 per decoder layer; ``flat`` is ``use_orig_params=False`` with PEFT's own wrap policy."""
    hybrid = strategy in (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    wrapped = FullyShardedDataParallel(
        model,
        sharding_strategy=strategy,
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if flat else ModuleWrapPolicy({LlamaDecoderLayer}),
        use_orig_params=not flat,
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16) if bf16 else None,
        device_mesh=_hybrid_mesh() if hybrid else None,
        device_id=DEVICE if DEVICE.type == "cpu" else torch.cuda.current_device(),
    )
    assert_fsdp1_shards(wrapped, whole=strategy is ShardingStrategy.NO_SHARD)
    names = [plain_name(name) for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert all(name.endswith("_flat_param") for name in names) if flat else all("lora_" in name for name in names)
    return Fsdp1(wrapped, optimizer_of(wrapped, settings), settings, bare=wrapped.module)


_fsdp2_shard1 = functools.partial(_fsdp2, columns_of_a=True)
ENGINES = [
    Engine("fsdp2", _fsdp2),
    # torch refuses Shard(1) where the columns do not divide: hidden 64 and intermediate 176
    Engine("fsdp2-shard1", _fsdp2_shard1, world_sizes=(2, 4)),
    Engine("fsdp2-hsdp", functools.partial(_fsdp2, hybrid=True), world_sizes=(4,)),
    Engine("fsdp2-hsdp-shard1", functools.partial(_fsdp2_shard1, hybrid=True), world_sizes=(4,)),
    Engine("fsdp2-offload", functools.partial(_fsdp2, offload=True)),
    Engine("fsdp1-full", _fsdp1),
    Engine("fsdp1-grad-op", functools.partial(_fsdp1, strategy=ShardingStrategy.SHARD_GRAD_OP)),
    Engine("fsdp1-no-shard", functools.partial(_fsdp1, strategy=ShardingStrategy.NO_SHARD)),
    Engine("fsdp1-hybrid", functools.partial(_fsdp1, strategy=ShardingStrategy.HYBRID_SHARD), world_sizes=(4,)),
    # bf16 compute over fp32 shards
    Engine("fsdp2-bf16", functools.partial(_fsdp2, bf16=True), bf16_factor_tolerance=8e-2, bf16_loss_tolerance=2e-3),
    Engine("fsdp1-bf16", functools.partial(_fsdp1, bf16=True), bf16_factor_tolerance=8e-2, bf16_loss_tolerance=2e-3),
    Engine("fsdp1-flat", functools.partial(_fsdp1, flat=True)),
]
