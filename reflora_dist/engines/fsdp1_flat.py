"""FSDP1 with ``use_orig_params=False``: the optimizer holds FlatParameters (PEFT's own wrap policy does this)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from ..adapters import AdapterPair
from .buffers import BufferEngine, Piece


def flat_parameter_engine(
    pairs: Sequence[AdapterPair],
    optimizer: torch.optim.Optimizer,
    units: Sequence[FullyShardedDataParallel],
    group: dist.ProcessGroup,
) -> BufferEngine:
    """Find the factors in the FlatParameters of the FSDP units.

    Args:
        units: every FSDP module of the model.
        group: the ranks over which the units shard.

    Raises:
        ValueError: a factor lies in no FlatParameter that the optimizer holds.
    """
    owned = {id(parameter) for parameters in optimizer.param_groups for parameter in parameters["params"]}
    handles = [unit._handle for unit in units if unit._handle is not None]
    buffers = [handle.flat_param for handle in handles if id(handle.flat_param) in owned]
    rank = dist.get_rank(group)
    places = {}
    for index, buffer in enumerate(buffers):
        shard_start, position = rank * buffer.numel(), 0
        for info, numel in zip(buffer._param_infos, buffer._numels, strict=True):
            first = max(position, shard_start)
            last = max(first, min(position + numel, shard_start + buffer.numel()))
            key = (id(info.module), info.param_name)
            places[key] = Piece(index, first - shard_start if last > first else 0, first - position, last - first)
            position += numel

    pieces = []
    for pair in pairs:
        for module in pair.factor_modules():
            inner = getattr(module, "_fsdp_wrapped_module", module)
            piece = places.get((id(inner), "weight"))
            if piece is None:
                raise ValueError(
                    f"{type(optimizer).__name__} does not hold the FlatParameter of {pair.name}: create the "
                    "optimizer from the wrapped model's parameters; embeddings need use_orig_params=True"
                )
            pieces.append(piece)
    return BufferEngine(pairs, optimizer, "fsdp1", group, buffers, pieces)
