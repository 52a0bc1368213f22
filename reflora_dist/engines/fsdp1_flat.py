"""The engine of FSDP1 with ``use_orig_params=False``, which PEFT's wrap policy needs: factors in FlatParameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from .flat_buffers import BufferEngine, piece_of_buffer
from .pairs import AdapterPair


def flat_parameter_engine(
    pairs: Sequence[AdapterPair],
    optimizer: torch.optim.Optimizer,
    units: Sequence[FullyShardedDataParallel],
    group: dist.ProcessGroup,
) -> BufferEngine:
    """Find the factors in the FlatParameters of the FSDP units and return the engine.

    Args:
        pairs: the model's adapters.
        optimizer: the torch optimizer that holds the FlatParameters.
        units: every FSDP module of the model.
        group: the ranks over which the units shard.

    Raises:
        ValueError: a factor lies in no FlatParameter that the optimizer holds.
    """
    owned = {id(parameter) for parameters in optimizer.param_groups for parameter in parameters["params"]}
    handles = [unit._handle for unit in units if unit._handle is not None]
    buffers = [handle.flat_param for handle in handles if id(handle.flat_param) in owned]
    rank = dist.get_rank(group)
    places = {
        key: piece_of_buffer(index, rank, buffer.numel(), position, numel)
        for index, buffer in enumerate(buffers)
        for key, (position, numel) in positions(buffer).items()
    }
    pieces = []
    for pair in pairs:
        for module, name in pair.owners():
            inner = getattr(module, "_fsdp_wrapped_module", module)
            piece = places.get((id(inner), name))
            if piece is None:
                raise ValueError(
                    f"{type(optimizer).__name__} does not hold the FlatParameter of {pair.name}: create the "
                    "optimizer from the wrapped model's parameters; embeddings need use_orig_params=True"
                )
            pieces.append(piece)
    return BufferEngine(pairs, optimizer, "fsdp1", group, buffers, pieces)


def positions(flat_parameter: Any) -> dict[tuple[int, str], tuple[int, int]]:
    """Return ``(position, numel)`` of every parameter in a whole FlatParameter, by the module's id and the name."""
    placed, position = {}, 0
    infos = iter(flat_parameter._param_infos)
    for is_padding, numel in zip(flat_parameter._is_padding_mask, flat_parameter._numels_with_padding, strict=True):
        if not is_padding:
            info = next(infos)
            placed[id(info.module), info.param_name] = (position, numel)
        position += numel
    return placed
