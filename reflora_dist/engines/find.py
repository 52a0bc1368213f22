"""Recognize the engine that trains a model, by the optimizer and by the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .base import Engine
from .fsdp1_flat import flat_parameter_engine
from .pairs import AdapterPair
from .parameters import FSDP1Engine, FSDP2Engine, ReplicatedEngine
from .whole_parameters import reshard
from .zero import ZeroEngine, is_deepspeed_optimizer


def find_engine(model: nn.Module, optimizer: Any, pairs: Sequence[AdapterPair]) -> Engine:
    """Recognize the engine from the optimizer and the parameters themselves.

    Args:
        model: bare or wrapped.
        optimizer: a torch optimizer, or any chain of wrappers around one (accelerate, DeepSpeed).
        pairs: the model's adapters.

    Raises:
        TypeError: the optimizer, or a wrapper around it, is not known.
        ValueError: the optimizer does not hold the factors, or the engine has an option that is not supported.
    """
    _refuse_double_wrapping(model)
    reshard(model)
    _refuse_frozen(pairs)
    innermost = _unwrap(optimizer)
    if is_deepspeed_optimizer(innermost):
        return ZeroEngine(pairs, innermost)
    if any(hasattr(factor, "ds_id") for pair in pairs for factor in (pair.lora_a, pair.lora_b)):
        raise ValueError(
            "the model is partitioned by ZeRO-3 but the optimizer is a plain torch optimizer: pass the optimizer "
            "that deepspeed.initialize or accelerator.prepare returned"
        )
    units = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    if units:
        return _fsdp1_engine(pairs, innermost, units)
    kinds = {isinstance(factor.data, DTensor) for pair in pairs for factor in (pair.lora_a, pair.lora_b)}
    if kinds == {True}:
        return FSDP2Engine(pairs, innermost)
    if kinds == {True, False}:
        raise ValueError("some factors are DTensors and some are not: shard all adapters with fully_shard, or none")
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    return ReplicatedEngine(pairs, innermost, "ddp" if distributed else "single")


def _unwrap(optimizer: Any) -> Any:
    """Follow ``.optimizer`` to DeepSpeed's wrapper, or to the torch optimizer at the end of the chain."""
    chain = [optimizer]
    while not is_deepspeed_optimizer(chain[-1]) and getattr(chain[-1], "optimizer", None) is not None:
        chain.append(chain[-1].optimizer)
    innermost = chain[-1]
    if not isinstance(innermost, torch.optim.Optimizer) and not is_deepspeed_optimizer(innermost):
        names = " -> ".join(type(link).__name__ for link in chain)
        raise TypeError(
            f"unknown optimizer {names}: pass a torch optimizer, or what accelerator.prepare or "
            "deepspeed.initialize returned"
        )
    return innermost


def _fsdp1_engine(
    pairs: Sequence[AdapterPair], optimizer: torch.optim.Optimizer, units: Sequence[FullyShardedDataParallel]
) -> Engine:
    groups = {id(unit.process_group): unit.process_group for unit in units if unit._handle is not None}
    sharded = any(unit._handle is not None and unit._handle.uses_sharded_strategy for unit in units)
    if sharded and len({tuple(dist.get_process_group_ranks(group)) for group in groups.values()}) > 1:
        raise ValueError("FSDP modules of this model shard over different process groups; use one for all")
    group = next(iter(groups.values()), None)
    if group is None:
        raise ValueError("the FSDP modules hold no parameters: pass the model that FSDP wrapped")
    if not sharded and not all(unit._use_orig_params for unit in units):
        raise ValueError("FSDP NO_SHARD with use_orig_params=False is not supported; set use_orig_params=True")
    if not sharded:
        return ReplicatedEngine(pairs, optimizer, "fsdp1")
    engine: Engine
    if all(unit._use_orig_params for unit in units):
        engine = FSDP1Engine(pairs, optimizer, units, group)
    else:
        engine = flat_parameter_engine(pairs, optimizer, units, group)
    engine.replicas = getattr(units[0], "_inter_node_pg", None)  # HYBRID_SHARD
    return engine


def _refuse_double_wrapping(model: nn.Module) -> None:
    wrappers = [
        type(module).__name__
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == "DeepSpeedEngine"
    ]
    if len(wrappers) > 1:
        raise ValueError(f"the model is wrapped more than once ({' in '.join(reversed(wrappers))}); wrap it once")


def _refuse_frozen(pairs: Sequence[AdapterPair]) -> None:
    for pair in pairs:
        # FSDP1 without original parameters leaves plain tensors on the modules; these need no gradient themselves.
        frozen = [
            side
            for side, factor in (("lora_A", pair.lora_a), ("lora_B", pair.lora_b))
            if isinstance(factor, nn.Parameter) and not factor.requires_grad
        ]
        if pair.layer.disable_adapters:
            raise ValueError(f"{pair.name} is switched off: call enable_adapter_layers() on the model first")
        if frozen:
            raise ValueError(
                f"{' and '.join(frozen)} of {pair.name} is frozen, S refactors both factors of a pair: set "
                "requires_grad (PeftModel.from_pretrained(..., is_trainable=True)) or deactivate the adapter"
            )
