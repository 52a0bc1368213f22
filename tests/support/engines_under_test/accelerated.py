"""The engines as accelerate prepares them.

On a CPU accelerate maps an FSDP configuration to plain DDP and ignores the plugin in silence; `fsdp_on_cpu`
makes the configuration real. Every wrap asserts what it got, so an engine that is not sharded cannot pass.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.engines_under_test.common import DEVICE, Engine, Wrapped, copied, optimizer_of, trainable, world_size
from tests.support.engines_under_test.fsdp import (
    assert_fsdp1_shards,
    assert_fsdp2_shards,
    gathered_by_fsdp1,
    gathered_by_fsdp2,
)
from tests.support.engines_under_test.zero import assert_zero_shards, gathered_by_deepspeed, zero_config
from tests.support.workloads import Factors, Settings, named_factors

FSDP_PLUGIN = {
    1: {
        "fsdp_version": 1,
        "reshard_after_forward": "FULL_SHARD",
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
        "use_orig_params": True,
        "sync_module_states": False,  # accelerate's part in it needs a GPU
        "cpu_ram_efficient_loading": False,
    },
    2: {
        "fsdp_version": 2,
        "reshard_after_forward": True,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    },
}


class Accelerated(Wrapped):
    """What ``accelerator.prepare`` returned; accelerate accumulates, clips and steps."""

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Any, settings: Settings) -> None:
        super().__init__(model, optimizer, settings, bare=accelerator.unwrap_model(model))
        self.accelerator = accelerator

    def accumulation_context(self, is_last: bool) -> AbstractContextManager[Any]:
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        if self.settings.clip and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        # done inside `backward`, where the prepared optimizer skips all but the last micro-batch
        assert self.accelerator.sync_gradients

    def factors(self) -> Factors:
        return gathered(self.accelerator, self.model)


def gathered(accelerator: Accelerator, model: nn.Module) -> Factors:
    """Every factor, whole, by the interface of the engine that accelerate chose."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return gathered_by_deepspeed(model)
    if accelerator.is_fsdp2:
        return gathered_by_fsdp2(model)
    if accelerator.distributed_type == DistributedType.FSDP:
        return gathered_by_fsdp1(model)
    return copied(named_factors(model))


def forget_accelerate() -> None:
    """Drop accelerate's process-wide state, so that one process can prepare several models in turn."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Have accelerate honour an FSDP plugin on a CPU, where it would train with plain DDP instead."""
    if DEVICE.type != "cpu":  # where it does so by itself
        yield
        return
    original = AcceleratorState.__init__

    def initialize(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # FSDP1 would look for an accelerator to put its units on
    AcceleratorState.__init__ = initialize  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = original  # type: ignore[method-assign]


def prepare_deepspeed_on_cpu() -> None:
    """Have accelerate count the ranks of a DeepSpeed run on a CPU.

    Without a backend by name it takes a CPU run under DeepSpeed for a single process: every rank would be given
    the same samples. With ``cpu=True`` it ignores the plugin and trains with plain DDP.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    state = PartialState(backend="gloo")
    assert state.distributed_type == DistributedType.DEEPSPEED
    assert state.num_processes == world_size()


def _ddp(model: nn.Module, settings: Settings, micro_batch_size: int) -> Wrapped:
    forget_accelerate()
    accelerator = Accelerator(cpu=DEVICE.type == "cpu", gradient_accumulation_steps=settings.grad_accum)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model, settings))
    assert isinstance(prepared, DistributedDataParallel)
    return Accelerated(accelerator, prepared, optimizer, settings)


def _fsdp(
    model: nn.Module, settings: Settings, micro_batch_size: int, *, version: int, hybrid: bool = False
) -> Wrapped:
    """``hybrid``: two ranks share a copy, as in fsdp2_hsdp.yaml."""
    forget_accelerate()
    sizes = ParallelismConfig(dp_replicate_size=world_size() // 2, dp_shard_size=2) if hybrid else None
    with fsdp_on_cpu():
        plugin = FullyShardedDataParallelPlugin(**FSDP_PLUGIN[version])
        accelerator = Accelerator(
            cpu=DEVICE.type == "cpu",
            fsdp_plugin=plugin,
            parallelism_config=sizes,
            gradient_accumulation_steps=settings.grad_accum,
        )
    if version == 2:
        prepared, optimizer = accelerator.prepare(model, optimizer_of(model, settings))
        assert_fsdp2_shards(prepared)
        for factor in named_factors(prepared).values():
            assert factor.placements == ((Replicate(), Shard(0)) if hybrid else (Shard(0),))
            assert factor.device_mesh.shape == ((world_size() // 2, 2) if hybrid else (world_size(),))
    else:
        # FSDP1 replaces the parameters, so the optimizer is made of the prepared model's
        prepared = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer_of(prepared, settings))
        assert_fsdp1_shards(prepared)
    assert {id(p) for p in trainable(prepared)} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    return Accelerated(accelerator, prepared, optimizer, settings)


def _zero(model: nn.Module, settings: Settings, micro_batch_size: int, *, stage: int) -> Wrapped:
    config = zero_config(settings, micro_batch_size, stage)
    forget_accelerate()
    plugin = DeepSpeedPlugin(hf_ds_config=config, gradient_clipping=settings.clip)
    return _prepared_zero(plugin, model, settings, stage)


def zero3_as_launched(model: nn.Module, settings: Settings, micro_batch_size: int) -> Wrapped:
    """By the configuration that ``accelerate launch`` put into variables, with what it leaves open filled in."""
    forget_accelerate()
    plugin = DeepSpeedPlugin()
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch_size
    plugin.deepspeed_config["gradient_clipping"] = settings.clip
    return _prepared_zero(plugin, model, settings, stage=3)


def _prepared_zero(plugin: DeepSpeedPlugin, model: nn.Module, settings: Settings, stage: int) -> Wrapped:
    prepare_deepspeed_on_cpu()
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=settings.grad_accum)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model, settings))
    assert_zero_shards(prepared, stage)
    return Accelerated(accelerator, prepared, optimizer, settings)


ENGINES = [
    Engine("ddp-accelerate", _ddp),
    Engine("fsdp2-accelerate", functools.partial(_fsdp, version=2)),
    Engine("fsdp2-hsdp-accelerate", functools.partial(_fsdp, version=2, hybrid=True), world_sizes=(4,)),
    Engine("fsdp1-accelerate", functools.partial(_fsdp, version=1)),
    *(Engine(f"zero{stage}-accelerate", functools.partial(_zero, stage=stage)) for stage in (1, 2, 3)),
]
