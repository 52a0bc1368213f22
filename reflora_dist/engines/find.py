"""The search for the engine that trains a model, by its optimizer and its parameters."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from .base import Engine
from .pairs import AdapterPair
from .replicated import ReplicatedEngine
from .whole_parameters import reshard
from .zero import is_deepspeed_optimizer


@functools.cache
def _recognizers() -> list[Callable[..., Engine | None]]:
    """Return the function ``recognize`` of every module in this folder that defines one.

    Each accepts only its own engine's models, so their order does not matter.
    """
    package = __name__.rpartition(".")[0]
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    modules = [importlib.import_module(f"{package}.{name}") for name in names if f"{package}.{name}" != __name__]
    return [module.recognize for module in modules if hasattr(module, "recognize")]


def find_engine(model: nn.Module, optimizer: Any, pairs: Sequence[AdapterPair]) -> Engine:
    """Return the engine that trains a model, recognized by the optimizer and the parameters.

    Args:
        model: the PEFT model, bare or wrapped. FSDP2 parameters that are gathered are sharded again.
        optimizer: a torch optimizer, or any chain of wrappers around one (accelerate, DeepSpeed).
        pairs: the model's adapters.

    Raises:
        TypeError: the optimizer or a wrapper around it is unknown.
        ValueError: the model is wrapped more than once, a factor is frozen, merged or switched off, the optimizer does
            not hold the factors, or an option of the engine is not supported.
    """
    _refuse_double_wrapping(model)
    reshard(model)
    _refuse_frozen(pairs)
    _refuse_tensor_parallelism(model, pairs)
    innermost = _unwrap(optimizer)
    for recognize in _recognizers():
        engine = recognize(model, innermost, pairs)
        if engine is not None:
            return engine
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    return ReplicatedEngine(pairs, innermost, "ddp" if distributed else "single")


def _unwrap(optimizer: Any) -> Any:
    """Follow ``.optimizer`` to DeepSpeed's wrapper or to the torch optimizer at the end of the chain."""
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


def _refuse_double_wrapping(model: nn.Module) -> None:
    wrappers = [
        type(module).__name__
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) or type(module).__name__ == "DeepSpeedEngine"
    ]
    if len(wrappers) > 1:
        raise ValueError(f"the model is wrapped more than once ({' in '.join(reversed(wrappers))}); wrap it once")


def _refuse_tensor_parallelism(model: nn.Module, pairs: Sequence[AdapterPair]) -> None:
    """Refuse adapters on layers that tensor parallelism cuts, in whatever way it was asked for.

    Raises:
        ValueError: a base layer is cut by transformers (``tp_plan``), torch (``parallelize_module``) or DeepSpeed
            (AutoTP), alone or together with FSDP2.
    """
    fully_sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for pair in pairs:
        by = _cut_by(pair.layer.get_base_layer(), fully_sharded)
        if by:
            raise ValueError(
                f"{pair.name} is on a layer that tensor parallelism cuts ({by}): a rank has the gradients of its part "
                "alone, and Gram matrices would have to be summed over these ranks too, which is not done; shard the "
                "model with FSDP2 or ZeRO instead"
            )


def _cut_by(base: nn.Module, fully_sharded: bool) -> str:
    """Return who cuts a base layer, in words; empty if tensor parallelism does not."""
    if type(base).__module__.startswith("deepspeed.module_inject"):
        return "DeepSpeed's tensor_parallel.autotp_size"
    if getattr(base, "_hf_tp_plan", None):
        return "transformers' tp_plan"
    weights = [parameter.data for parameter in base.parameters(recurse=False) if isinstance(parameter.data, DTensor)]
    for weight in weights:
        cuts = sum(not isinstance(placement, Replicate) for placement in weight.placements)
        if cuts > int(fully_sharded) or "tp" in (weight.device_mesh.mesh_dim_names or ()):
            return f"its weight has the placements {weight.placements}"
    return ""


def _refuse_frozen(pairs: Sequence[AdapterPair]) -> None:
    for pair in pairs:
        # FSDP1 without original parameters leaves plain tensors on the modules, which may not require gradients.
        frozen = [
            side
            for side, factor in (("lora_A", pair.lora_a), ("lora_B", pair.lora_b))
            if isinstance(factor, nn.Parameter) and not factor.requires_grad
        ]
        if pair.layer.disable_adapters:
            raise ValueError(f"{pair.name} is switched off: call enable_adapter_layers() on the model first")
        if pair.layer.merged:
            raise ValueError(f"{pair.name} is merged into the base: call unmerge_adapter() on the model first")
        if frozen:
            raise ValueError(
                f"{' and '.join(frozen)} of {pair.name} is frozen, S refactors both factors of a pair: set "
                "requires_grad (PeftModel.from_pretrained(..., is_trainable=True)) or deactivate the adapter"
            )
