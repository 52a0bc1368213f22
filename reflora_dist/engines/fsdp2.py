"""The engine of FSDP2, ``fully_shard``, where parameters are DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..algebra.types import SIDE_A, SIDE_B
from ..collectives.tiling import Layout
from .base import Engine
from .pairs import AdapterPair
from .parameters import ParameterEngine


class FSDP2Engine(ParameterEngine):
    """The engine of ``fully_shard``: DTensors, sharded by rows (the default) or, for lora_A ``[r, in]``, by columns.

    | placement | lora_A ``[in, r]``, lora_B ``[out, r]`` | lora_A ``[r, in]`` |
    |---|---|---|
    | Shard(0) | whole rows of the tall factor | some of the r rows: a flat piece |
    | Shard(1) | refused | whole columns: rows of the tall factor |

    Raises:
        ValueError: the optimizer does not hold the factors, a placement is not supported, or the factors lie on
            different device meshes.
    """

    name = "fsdp2"
    resumes_on_other_ranks = True
    has_peft_form = True

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

    @torch.no_grad()  # without autograd to_local() costs nothing
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
                "gathered; call model.reshard() before optimizer.step(), or evaluate after it"
            )
        return factors  # type: ignore[return-value]

    @torch.no_grad()
    def moments(self) -> list[dict[str, Tensor]]:
        return [{key: _local(value) for key, value in state.items()} for state in super().moments()]

    def layouts(self) -> list[Layout]:
        return self._layouts


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _chunk(factor: Tensor, dim: int, world_size: int) -> int:
    """Return the elements of a rank's piece. torch rounds up the rows per rank, so the last pieces may be smaller."""
    size = factor.shape[dim]
    return -(-size // world_size) * (factor.numel() // size)


def _shard_dim(name: str, factor: Tensor) -> int:
    """Return the dimension that the mesh's last axis shards. An axis before it may replicate (HSDP).

    Raises:
        ValueError: the placements are others.
    """
    assert isinstance(factor, DTensor)
    *outer, last = factor.placements
    if type(last) is not Shard or len(outer) > 1 or any(not isinstance(axis, Replicate) for axis in outer):
        raise ValueError(
            f"{name} has placements {factor.placements}; supported are (Shard,) and (Replicate, Shard). "
            "Tensor parallelism of adapters is not"
        )
    return last.dim


def recognize(model: nn.Module, optimizer: Any, pairs: Sequence[AdapterPair]) -> Engine | None:
    """Return the engine if the factors are DTensors, else None.

    Raises:
        ValueError: only some of the factors are DTensors.
    """
    kinds = {isinstance(factor.data, DTensor) for pair in pairs for factor in (pair.lora_a, pair.lora_b)}
    if kinds == {True, False}:
        raise ValueError("some factors are DTensors and some are not: shard all adapters with fully_shard, or none")
    return FSDP2Engine(pairs, optimizer) if kinds == {True} else None
