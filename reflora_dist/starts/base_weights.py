"""This rank's part of the frozen weight under an adapter, for every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import Embedding
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.fsdp import is_fsdp_enabled

from ..engines.pairs import AdapterPair
from ..engines.whole_parameters import whole_shape
from .base_change import Block, blocks_of_flat_piece, checksum

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def base_weight(pair: AdapterPair) -> nn.Parameter:
    """Return the frozen weight that the pair adapts."""
    layer: Any = pair.layer.get_base_layer()
    return layer.weight


def stored_transposed(pair: AdapterPair) -> bool:
    """Return whether the weight is stored ``[in, out]``, as ``(B A)^T``: embeddings and transformers' Conv1D."""
    return isinstance(pair.layer, Embedding) or bool(getattr(pair.layer, "fan_in_fan_out", False))


def rank_holds_base() -> bool:
    """Return whether this rank's base weights hold the model's values.

    With accelerate's ``cpu_ram_efficient_loading`` only the first rank reads the weights. The other ranks hold
    placeholders, until the model is wrapped, which overwrites them.
    """
    return not is_fsdp_enabled() or dist.get_rank() == 0


def refuse_unsupported(model: nn.Module, pairs: Sequence[AdapterPair]) -> None:
    """Refuse models whose base weights cannot be changed, before anything changes.

    Raises:
        ValueError: a base weight is quantized, shared, merged or sharded in an unknown way, or an engine already keeps
            copies of the factors.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is wrapped by FSDP1 already, which cuts weights in pieces: call this before FSDP(...)"
        )
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for pair in pairs:
        weight: Any = base_weight(pair)
        if getattr(weight, "quant_state", None) is not None or weight.dtype not in _FLOATS:
            raise ValueError(
                f"the base weight of {pair.name} is quantized ({type(weight).__name__}, {weight.dtype}): the change "
                "W - scaling * B A would be rounded away; load the base in bfloat16 or float32, or use PEFT's own start"
            )
        if uses[id(weight)] > 1:
            raise ValueError(
                f"the base weight of {pair.name} is shared with another module, which would change too; leave it out "
                "of target_modules"
            )
        if pair.layer.merged:
            raise ValueError(f"adapter {pair.name} is merged into the base: call model.unmerge_adapter() first")
        expected = (
            (pair.in_features, pair.out_features) if stored_transposed(pair) else (pair.out_features, pair.in_features)
        )
        shape = whole_shape(weight)
        if not shape or (shape[0], math.prod(shape[1:])) != expected:
            raise ValueError(f"the base weight of {pair.name} has shape {tuple(shape)}, expected {expected}")
        _refuse_engine(pair, weight)


def _refuse_engine(pair: AdapterPair, weight: Any) -> None:
    for tensor in (weight, pair.lora_a, pair.lora_b):
        if any(hasattr(tensor, attribute) for attribute in ("_z3_optimizer", "_zero_optimizer", "_hp_mapping")):
            raise ValueError(
                "the model has been given to deepspeed.initialize, which keeps master copies: call this before "
                "(a base built under zero.Init is fine)"
            )
    if hasattr(weight, "ds_id"):
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if weight.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
            raise ValueError(f"the base weight of {pair.name} is gathered: call this outside GatheredParameters")
        if weight.ds_tensor.status is not PartitionedParamStatus.AVAILABLE:
            raise ValueError(f"the base weight of {pair.name} is offloaded to NVMe, where it cannot be changed")
        if getattr(weight, "ds_secondary_tensor", None) is not None or getattr(weight, "partition_scale", None):
            raise ValueError("zero_hpz_partition_size and zero_quantized_weights keep further copies of the base")
    elif isinstance(weight.data, DTensor):
        _sharded_dim(weight.data)


def _sharded_dim(weight: DTensor) -> tuple[int, int] | None:
    """Return the ``(mesh axis, tensor dim)`` along which a DTensor is cut; None if it is replicated."""
    cuts = [
        (axis, placement) for axis, placement in enumerate(weight.placements) if not isinstance(placement, Replicate)
    ]
    if not cuts:
        return None
    (axis, placement), *more = cuts
    if more or type(placement) is not Shard or placement.dim > (1 if weight.ndim == 2 else 0):
        raise ValueError(f"a base weight is placed as {weight.placements}; one Shard(0) or Shard(1) is supported")
    return axis, placement.dim


def local_blocks(pair: AdapterPair) -> list[Block]:
    """Return this rank's part of the base weight as rectangles of ``[rows, columns]``, as it is stored. Local.

    The list is empty where this rank holds no element, or only placeholders (:func:`rank_holds_base`).

    ===============================  ============================================
    one process, DDP, ZeRO-1/2       the whole weight
    ZeRO-3, ``zero.Init``            elements of the flat piece, rows may be cut
    FSDP2                            whole rows, with ``Shard(1)`` whole columns
    ===============================  ============================================
    """
    weight: Any = base_weight(pair)
    # once it is sharded, each rank holds its own values
    if not rank_holds_base() and not isinstance(weight.data, DTensor):
        return []
    if hasattr(weight, "ds_id"):
        piece = weight.ds_tensor.detach()
        start = dist.get_rank(weight.ds_process_group) * piece.numel()
        count = max(0, min(piece.numel(), weight.ds_numel - start))  # without the padding of the last pieces
        return blocks_of_flat_piece(piece.view(-1)[:count], start, math.prod(weight.ds_shape[1:]))
    weight = weight.data
    if isinstance(weight, DTensor):
        local, offset = weight.to_local(), [0, 0]
        if (cut := _sharded_dim(weight)) is not None:
            axis, dim = cut
            size = weight.shape[dim]
            chunk = -(-size // weight.device_mesh.size(axis))
            offset[dim] = min(size, weight.device_mesh.get_local_rank(axis) * chunk)
        return [Block(local.flatten(1), *offset)] if local.numel() else []
    return [Block(weight.view(weight.shape[0], -1) if weight.ndim > 2 else weight, 0, 0)]


def base_checksums(pairs: Sequence[AdapterPair]) -> list[int]:
    """Return one checksum per base weight; it does not depend on how the weights are sharded.

    Raises:
        ValueError: ranks that hold the same part of a weight have different values.

    Communication: one all-gather of objects; every rank must call.
    """
    own = {
        (index, block.row, block.column, tuple(block.tensor.shape)): checksum(block)
        for index, pair in enumerate(pairs)
        for block in local_blocks(pair)
    }
    found = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        found = [{}] * dist.get_world_size()
        dist.all_gather_object(found, own)
    parts: dict[Any, int] = {}
    for rank, sums in enumerate(found):
        for key, value in sums.items():
            if parts.setdefault(key, value) != value:
                raise ValueError(
                    f"rank {rank} holds another base weight of {pairs[key[0]].name} than the ranks before it: load "
                    "the same base on every rank"
                )
    totals = [0] * len(pairs)
    for key, value in parts.items():
        totals[key[0]] = (totals[key[0]] + value) % 2**64
    return totals
