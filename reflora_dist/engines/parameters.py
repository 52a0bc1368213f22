"""Engines whose optimizer updates the model's own parameters: one process, DDP, FSDP1 and FSDP2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..algebra.types import SIDE_A, SIDE_B
from ..collectives.tiling import Layout
from .base import Engine
from .fsdp1_flat import positions
from .pairs import AdapterPair


class ParameterEngine(Engine):
    """The optimizer holds the factors themselves, whole or as the local part of a sharded parameter."""

    def __init__(self, pairs: Sequence[AdapterPair], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(pairs, optimizer)
        self._check_ownership(
            ValueError, "create the optimizer from the model's parameters after wrapping it, or pass the right one"
        )
        for name, weight in zip(self._factor_names(), self.weights(), strict=True):
            if not weight.is_contiguous():
                raise ValueError(
                    f"{name} has strides {weight.stride()}, and its rows have to follow each other in memory: give the "
                    "adapter's weights back their layout (memory_format=torch.contiguous_format)"
                )
        self._layout_at_attach = self._current_layout()

    def weights(self) -> list[Tensor]:
        return self._factors()

    def gradients(self) -> list[Tensor | None]:
        return [factor.grad for factor in self._factors()]

    def moments(self) -> list[dict[str, Tensor]]:
        # of the parameter's size, as opposed to Adam's step count
        states = [self.optimizer.state.get(factor, {}) for factor in self._factors()]
        return [
            {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
            for state in states
        ]

    def holders(self) -> list[tuple[Tensor, int]]:
        return [(factor, 0) for factor in self._factors()]

    def check(self) -> None:
        if self._current_layout() != self._layout_at_attach:
            raise RuntimeError(
                "the model was sharded or moved after attach(): call attach(model, optimizer, config) with what "
                "fully_shard / FSDP / deepspeed.initialize / accelerator.prepare returned"
            )
        self._check_ownership(RuntimeError, "the optimizer was rebuilt after attach(): detach, then attach again")

    def _current_layout(self) -> list[tuple[type, torch.Size, torch.device]]:
        return [
            (type(factor.data), weight.shape, weight.device)
            for factor, weight in zip(self._factors(), self.weights(), strict=True)
        ]

    def _check_ownership(self, error: type[Exception], remedy: str) -> None:
        owned = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        missing = [n for n, f in zip(self._factor_names(), self._factors(), strict=True) if id(f) not in owned]
        if missing:
            name = type(self.optimizer).__name__
            raise error(f"{name} does not hold {len(missing)} of the factors ({missing[0]}, ...): {remedy}")

    def _check_whole(self) -> None:
        for pair in self.pairs:
            numel = pair.lora_a.numel() + pair.lora_b.numel()
            if numel != pair.lora_rank * (pair.in_features + pair.out_features):
                raise ValueError(f"{pair.name} is sharded, but not the model given: pass the wrapped model")


class ReplicatedEngine(ParameterEngine):
    """One process, DDP, FSDP1 NO_SHARD, or adapters that are left out of sharding: every rank holds all."""

    layout = "whole"

    def __init__(self, pairs: Sequence[AdapterPair], optimizer: torch.optim.Optimizer, name: str) -> None:
        super().__init__(pairs, optimizer)
        self.name = name
        self._check_whole()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.replicas = dist.group.WORLD

    def layouts(self) -> list[Layout]:
        return [pair.whole(side) for pair in self.pairs for side in (SIDE_A, SIDE_B)]


class FSDP2Engine(ParameterEngine):
    """``fully_shard``: DTensors, sharded by rows (the default) or, for lora_A ``[r, in]``, by columns.

    | placement | lora_A ``[in, r]``, lora_B ``[out, r]`` | lora_A ``[r, in]`` |
    |---|---|---|
    | Shard(0) | whole rows of the tall factor | some of the r rows: a flat piece |
    | Shard(1) | refused | whole columns: rows of the tall factor |
    """

    name = "fsdp2"

    def __init__(self, pairs: Sequence[AdapterPair], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(pairs, optimizer)
        self._shard_dims = [
            _shard_dim(name, factor) for name, factor in zip(self._factor_names(), self._factors(), strict=True)
        ]
        wholes = [pair.whole(side) for pair in self.pairs for side in (SIDE_A, SIDE_B)]
        for name, dim, whole in zip(self._factor_names(), self._shard_dims, wholes, strict=True):
            if dim != 0 and not (whole.columns and dim == 1):
                raise ValueError(
                    f"{name} of shape {whole.shape} is sharded on dim {dim}; shard it on dim 0, so that rows stay whole"
                )
        mesh = self._factors()[0].device_mesh  # type: ignore[attr-defined]
        if any(factor.device_mesh != mesh for factor in self._factors()):  # type: ignore[attr-defined]
            raise ValueError("the factors lie on different device meshes; shard all adapters on one mesh")
        self.group = mesh.get_group(mesh.ndim - 1)
        self.replicas = mesh.get_group(0) if mesh.ndim == 2 else None
        self._layouts = [
            whole._replace(chunk=_chunk(factor, dim, mesh.size(mesh.ndim - 1)), by_rows=dim == 1)
            for factor, dim, whole in zip(self._factors(), self._shard_dims, wholes, strict=True)
        ]
        self.layout = "flat" if any(layout.columns and not layout.by_rows for layout in self._layouts) else "tall"
        self._check_pieces()

    @torch.no_grad()  # in which to_local() takes no part in autograd, and costs nothing
    def weights(self) -> list[Tensor]:
        return [factor.to_local() for factor in self._sharded()]

    @torch.no_grad()
    def gradients(self) -> list[Tensor | None]:
        gradients = [factor.grad for factor in self._sharded()]
        return [None if gradient is None else gradient.to_local() for gradient in gradients]  # type: ignore[attr-defined]

    def _sharded(self) -> list[DTensor]:
        factors = self._factors()
        if not all(isinstance(factor, DTensor) for factor in factors):
            raise RuntimeError(
                "the factors are gathered: a forward without gradients ran after backward() and left FSDP2's root unit "
                "so; call model.reshard() before optimizer.step(), or evaluate after it"
            )
        return factors  # type: ignore[return-value]

    @torch.no_grad()
    def moments(self) -> list[dict[str, Tensor]]:
        return [{key: _local(value) for key, value in state.items()} for state in super().moments()]

    def layouts(self) -> list[Layout]:
        return self._layouts


class FSDP1Engine(ParameterEngine):
    """``FullyShardedDataParallel(use_orig_params=True)``: parameters are pieces of the rank's flat shard."""

    name = "fsdp1"

    def __init__(
        self,
        pairs: Sequence[AdapterPair],
        optimizer: torch.optim.Optimizer,
        units: Sequence[FullyShardedDataParallel],
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(pairs, optimizer)
        self.group = group
        flats = [unit._handle.flat_param for unit in units if unit._handle is not None]
        places = {key: (flat, position) for flat in flats for key, (position, _) in positions(flat).items()}
        self._layouts = []
        for factor, (module, name) in enumerate(self._owners):
            flat, position = places[id(getattr(module, "_fsdp_wrapped_module", module)), name]
            whole = self.pairs[factor // 2].whole(factor % 2)
            self._layouts.append(whole._replace(chunk=flat._sharded_size.numel(), offset=position))
        self.layout = "flat" if any(layout.columns for layout in self._layouts) else "tall"
        self._check_pieces()

    def layouts(self) -> list[Layout]:
        return self._layouts


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _chunk(factor: Tensor, dim: int, world_size: int) -> int:
    """Elements of a rank's part, the last ones' may be smaller: torch cuts a dimension into equal parts, rounded up."""
    size = factor.shape[dim]
    return -(-size // world_size) * (factor.numel() // size)


def _shard_dim(name: str, factor: Tensor) -> int:
    """The one dimension that the mesh's last axis shards; an axis before it may replicate (HSDP)."""
    assert isinstance(factor, DTensor)
    *outer, last = factor.placements
    if type(last) is not Shard or len(outer) > 1 or any(not isinstance(axis, Replicate) for axis in outer):
        raise ValueError(
            f"{name} has placements {factor.placements}; supported are (Shard,) and (Replicate, Shard). "
            "Tensor parallelism of adapters is not"
        )
    return last.dim
