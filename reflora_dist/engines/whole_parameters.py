"""Gathering and scattering whole parameters of a sharded model, one at a time, by their names without wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from .pairs import clean_name

Owner = tuple[nn.Module, str]


def owned_tensors(model: nn.Module, peft_model: PeftModel) -> dict[str, Owner]:
    """Return the module and attribute of every parameter and buffer, by its name in the PEFT model without wrappers.

    FSDP1 may keep parameters as plain attributes, which are views of its flat buffers. They are read from its units.

    Raises:
        ValueError: the model was taken out of its FSDP1 wrapper.
    """
    module_names = {id(module): name for name, module in peft_model.named_modules()}
    owners = {}
    for module in peft_model.modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for attribute, _ in tensors:
            if attribute != "_flat_param":
                owners[clean_name(f"{module_names[id(module)]}.{attribute}")] = (module, attribute)
    for unit in _fsdp1_units(model):
        for module, attribute in _unit_tensors(unit):
            if id(module) in module_names:
                owners[clean_name(f"{module_names[id(module)]}.{attribute}")] = (module, attribute)
    if _fsdp1_units(model) and not isinstance(model, FullyShardedDataParallel):
        _require_all_adapters(model, peft_model, owners)
    return owners


def _require_all_adapters(model: nn.Module, peft_model: PeftModel, owners: Mapping[str, Owner]) -> None:
    """Refuse a model that was taken out of its FSDP1 wrapper: the parameters in that wrapper cannot be found."""
    units = _fsdp1_units(model)
    held = {(id(module), attribute) for unit in units for module, attribute in _unit_tensors(unit)}
    held_names = {name for name, (module, attribute) in owners.items() if (id(module), attribute) in held}
    layers = [clean_name(name) for name, module in peft_model.named_modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        prefix = f"{layer}.{peft_model.base_model.prefix}"
        if units[0]._is_root is None or not any(name.startswith(prefix) for name in held_names):
            raise ValueError(
                f"the bare {type(model).__name__} does not reach all of FSDP's units: pass the model as "
                "FullyShardedDataParallel(...) or accelerator.prepare(...) returned it"
            )


def whole_shapes(model: nn.Module, owners: Mapping[str, Owner]) -> dict[str, torch.Size]:
    """Return the whole shape of every parameter, also if this rank holds a part of it. Local, no communication."""
    in_units: dict[tuple[int, str], torch.Size] = {}
    for unit in _fsdp1_units(model):
        if unit._handle is not None:
            flat = unit._handle.flat_param
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
                in_units[id(info.module), info.param_name] = shape
    shapes = {}
    for name, (module, attribute) in owners.items():
        tensor = getattr(module, attribute)
        own = in_units.get((id(module), attribute), tensor.shape)
        shapes[name] = torch.Size(getattr(tensor, "ds_shape", own))
    return shapes


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the whole shape of a parameter that ZeRO-3 or DTensor may have sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def reshard(model: nn.Module) -> None:
    """Shard all FSDP2 parameters again: after an evaluation the root unit keeps whole ones until a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: nn.Module, owners: Mapping[str, Owner], wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield every wanted tensor, whole, by its name, in the same order on all ranks.

    Copy a tensor before asking for the next one.

    Communication: one gather per tensor, under FSDP1 one per unit that holds any; every rank must exhaust it.
    """
    _end_prefetches(model)
    remaining = {name: owner for name, owner in owners.items() if name in wanted}
    for name, tensor in _in_fsdp1_units(model, remaining, writeback=False):
        del remaining[name]
        yield name, tensor
    for name, (module, attribute) in remaining.items():
        with _whole(getattr(module, attribute)) as tensor:
            yield name, tensor


@torch.no_grad()
def scatter(model: nn.Module, owners: Mapping[str, Owner], values: Mapping[str, Tensor]) -> None:
    """Write whole values, the same on all ranks, into the model's parameters: the reverse of :func:`gather`.

    Raises:
        ValueError: a value's shape differs from its parameter's.

    Communication: as :func:`gather`, but rank 0 sends out DTensors and ZeRO-3 parameters; every rank must call.
    """
    reshard(model)
    _end_prefetches(model)
    remaining = {name: owners[name] for name in owners if name in values}
    for name, tensor in _in_fsdp1_units(model, remaining, writeback=True):
        del remaining[name]
        _copy(name, tensor, values[name])
    for name, (module, attribute) in remaining.items():
        tensor = getattr(module, attribute)
        if hasattr(tensor, "ds_id"):
            with _gathered_by_deepspeed(tensor, modifier_rank=0):
                _copy(name, tensor, values[name])
        elif isinstance(tensor.data, DTensor):
            mesh, placements = tensor.data.device_mesh, tensor.data.placements
            value = distribute_tensor(values[name].to(mesh.device_type, tensor.dtype), mesh, placements)
            _copy(name, tensor.data.to_local(), value.to_local())
        else:
            _copy(name, tensor, values[name])


def _end_prefetches(model: nn.Module) -> None:
    """Wait for the parameters that ZeRO-3 gathers ahead, and partition them again.

    An evaluation leaves such gathers to a backward that does not come. DeepSpeed itself ends them at the next forward.
    """
    for module in model.modules():
        in_flight = getattr(module, "ds_inflight_param_registry", {})
        while in_flight:
            parameter, handle = in_flight.popitem()
            handle.wait()
            parameter.partition()


def _in_fsdp1_units(model: nn.Module, wanted: Mapping[str, Owner], writeback: bool) -> Iterator[tuple[str, Tensor]]:
    names = {(id(module), attribute): name for name, (module, attribute) in wanted.items()}
    units = _fsdp1_units(model)
    if units and units[0]._is_root is None:
        # Before the first forward FSDP makes the first unit that it summons the root.
        with FullyShardedDataParallel.summon_full_params(units[0], recurse=False, writeback=False):
            pass
    for unit in units:
        held = [(module, attribute) for module, attribute in _unit_tensors(unit) if (id(module), attribute) in names]
        if held:
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback):
                for module, attribute in held:
                    yield names.pop((id(module), attribute)), getattr(module, attribute)


def _copy(name: str, target: Tensor, value: Tensor) -> None:
    if target.shape != value.shape:
        raise ValueError(f"{name} has shape {tuple(target.shape)}, the file holds {tuple(value.shape)}")
    target.copy_(value)


@contextlib.contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    if hasattr(tensor, "ds_id"):
        with _gathered_by_deepspeed(tensor):
            yield tensor
    elif isinstance(tensor.data, DTensor):
        # Offloaded shards lie in CPU memory, while the mesh may communicate on another device.
        yield tensor.data.to(tensor.data.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    else:
        yield tensor


def _gathered_by_deepspeed(tensor: Tensor, modifier_rank: int | None = None) -> AbstractContextManager[None]:
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=modifier_rank)


def _fsdp1_units(model: nn.Module) -> list[FullyShardedDataParallel]:
    return [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]


def _unit_tensors(unit: FullyShardedDataParallel) -> list[tuple[nn.Module, str]]:
    if unit._handle is None:
        return []
    flat = unit._handle.flat_param
    infos: list[Any] = [*flat._param_infos, *flat._shared_param_infos]
    return [(info.module, info.param_name) for info in infos]
