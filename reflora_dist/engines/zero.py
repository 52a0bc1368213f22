"""The engine of DeepSpeed ZeRO-1, 2, 3 and BF16_Optimizer, whose factors are slices of flat fp32 master buffers.

DeepSpeed has no public access to the gradient that the optimizer is about to read: there ``safe_get_local_grad`` is
stale and ``safe_set_local_grad`` has no effect. So this module reads the buffers themselves. It computes the positions
of a factor's pieces from the layout, and attach() compares them with each rank's buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .base import Engine, Firing
from .flat_buffers import BufferEngine, Piece, piece_of_buffer
from .pairs import AdapterPair

_STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
_STAGE_1_2 = "DeepSpeedZeroOptimizer"
_BF16 = "BF16_Optimizer"
PLAIN_OPTIMIZER = (
    "the model is partitioned by ZeRO-3 but the optimizer is a plain torch optimizer: pass the optimizer that "
    "deepspeed.initialize or accelerator.prepare returned"
)


def is_deepspeed_optimizer(optimizer: object) -> bool:
    """Return whether the object is one of DeepSpeed's wrappers around a torch optimizer."""
    return not isinstance(optimizer, torch.optim.Optimizer) and any(
        base.__module__.startswith("deepspeed.") for base in type(optimizer).__mro__
    )


class ZeroEngine(BufferEngine):
    """The engine of a ZeRO optimizer, with one firing per param group, under ZeRO-3 one per sub-group.

    Args:
        pairs: the model's adapters.
        zero: the optimizer that ``deepspeed.initialize`` returned.

    Raises:
        ValueError: the ZeRO variant or one of its options is not supported, or a factor is not in its buffers.
    """

    state_format = "deepspeed"

    def __init__(self, pairs: Sequence[AdapterPair], zero: Any) -> None:
        kind = type(zero).__name__
        _refuse_unsupported(kind, zero)
        name = {_STAGE_3: "zero3", _BF16: "zero1 (BF16_Optimizer)"}.get(kind, "")
        if not name:
            name = "zero2" if zero.partition_gradients else "zero1"
        buffers, places = _places(kind, zero)
        self._zero = zero
        self._kind = kind
        self._fired: set[int] = set()
        group = _partition_groups(kind, zero)[0]
        super().__init__(pairs, zero.optimizer, name, group, buffers, _select(pairs, places, kind))

    def firing(self) -> Firing:
        current, fired = self._current_buffers()
        return Firing(
            present=tuple(piece.buffer in current for piece in self._pieces),
            first=not fired,
            last=len(fired | current) == len(self._buffers),
        )

    def end_firing(self) -> None:
        current, fired = self._current_buffers()
        self._fired = fired | current
        if len(self._fired) == len(self._buffers):
            self._fired = set()

    def publish_weights(self, in_step: bool) -> None:
        zero = self._zero
        if self._kind == _STAGE_3:
            if not in_step:
                zero.checkpoint_event_prologue()  # partitions gathered parameters: the epilogue gathers them anew
            # For sub-groups before the last the engine has done this already, with weights that have changed since.
            for index, (working, master) in enumerate(
                zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
            ):
                working.data.copy_(master.data)
                zero._unflatten_partitioned_parameters(index)
            if not in_step:
                zero.checkpoint_event_epilogue()  # gathers the parameters that stay whole on every rank
        elif not in_step:
            zero.update_lp_params()
        elif self._kind == _STAGE_1_2:
            # This rank's partitions are enough: the engine gathers all partitions at the end of the step.
            for partitions, master, group in zip(
                zero.parallel_partitioned_bit16_groups, self._buffers, zero.real_dp_process_group, strict=True
            ):
                partitions[dist.get_rank(group)].data.copy_(master.data)

    def require_wrapped(self, model: nn.Module) -> None:
        if not hasattr(model, "load_universal_checkpoint"):
            raise ValueError(f"pass the engine that deepspeed.initialize returned, not the bare {type(model).__name__}")

    def write_masters(self, values: Mapping[Tensor, Tensor]) -> None:
        buffers, places = _places(self._kind, self._zero)
        for parameter, value in values.items():
            piece = places.get(id(parameter))
            if piece is not None:
                target = buffers[piece.buffer].detach()[piece.offset : piece.offset + piece.numel]
                target.copy_(value.reshape(-1)[piece.start : piece.start + piece.numel])

    def _current_buffers(self) -> tuple[set[int], set[int]]:
        """Return the buffers that the current firing updates, and those that earlier firings of the step updated."""
        active = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        current = {index for index, buffer in enumerate(self._buffers) if id(buffer) in active}
        # A buffer that fires again begins a new step: the step before was cut short.
        return current, set() if current & self._fired else self._fired


def recognize(model: nn.Module, optimizer: Any, pairs: Sequence[AdapterPair]) -> Engine | None:
    """Return the engine if the optimizer is DeepSpeed's, else None.

    Raises:
        ValueError: the model is DeepSpeed's but the optimizer is not, or an option is not supported.
    """
    if is_deepspeed_optimizer(optimizer):
        return ZeroEngine(pairs, optimizer)
    if any(hasattr(factor, "ds_id") for pair in pairs for factor in (pair.lora_a, pair.lora_b)):
        raise ValueError(PLAIN_OPTIMIZER)
    return None


def _refuse_unsupported(kind: str, zero: Any) -> None:
    if kind not in (_STAGE_3, _STAGE_1_2, _BF16):
        raise ValueError(f"DeepSpeed's {kind} is not supported; set zero_optimization.stage to 1, 2 or 3")
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise ValueError("NVMe offload is not supported: the masters are not in memory; offload to cpu instead")
    ratio = getattr(zero, "partial_offload", 1.0)
    if getattr(zero, "offload_optimizer", False) and ratio < 1.0:
        raise ValueError(f"offload_optimizer.ratio={ratio} is not supported: two optimizers share the step; set 1.0")
    if getattr(zero, "zenflow", False):
        raise ValueError("zenflow is not supported: it updates outside the optimizer's step; remove it")
    # Ulysses' mpu cuts sequences, not weights: gradients are summed over its ranks before the step.
    mpu = getattr(zero, "mpu", None)
    of_sequences = hasattr(mpu, "initialize_sequence_parallel")
    if getattr(zero, "model_parallel_group", None) is not None or (mpu is not None and not of_sequences):
        raise ValueError("tensor or pipeline parallelism (mpu) is not supported; use data parallelism with ZeRO")
    if not isinstance(zero.optimizer, torch.optim.Optimizer):
        raise ValueError(f"DeepSpeed has no optimizer of its own here ({type(zero.optimizer).__name__}); configure one")
    if len({tuple(dist.get_process_group_ranks(group)) for group in _partition_groups(kind, zero)}) > 1:
        raise ValueError("parameters are partitioned over several process groups (mixture of experts): not supported")


def _partition_groups(kind: str, zero: Any) -> list[dist.ProcessGroup]:
    """Return, for each buffer, the process group over which its parameters are cut."""
    if kind == _STAGE_3:
        return [zero._get_sub_group_process_group(index) for index in range(len(zero.fp16_groups))]
    return list(zero.real_dp_process_group)


def _places(kind: str, zero: Any) -> tuple[Sequence[Tensor], dict[int, Piece]]:
    """Return this rank's master buffers, and each parameter's piece in them by the parameter's id."""
    group = _partition_groups(kind, zero)[0]
    if kind == _STAGE_3:
        return zero.fp32_partitioned_groups_flat, _places_stage_3(zero, dist.get_rank(group))
    if kind == _STAGE_1_2:
        buffers, groups, flats = zero.single_partition_of_fp32_groups, zero.bit16_groups, zero.bit16_groups_flat
    else:
        buffers, groups, flats = zero.fp32_groups_flat_partition, zero.bf16_groups, zero.bf16_groups_flat
    assert all(b.numel() * dist.get_world_size(group) == f.numel() for b, f in zip(buffers, flats, strict=True))
    return buffers, _places_stage_1_2(groups, flats, group)


def _places_stage_3(zero: Any, rank: int) -> dict[int, Piece]:
    """Return the pieces under ZeRO-3, by the parameter's id.

    Every parameter is cut into world_size equal pieces, the last ones padded. A buffer holds a sub-group's pieces.
    """
    places = {}
    for index, parameters in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in parameters:
            numel = parameter.partition_numel()
            start = min(rank * numel, parameter.ds_numel)
            places[id(parameter)] = Piece(index, offset, start, min(numel, parameter.ds_numel - start), chunk=numel)
            offset += numel
    return places


def _places_stage_1_2(
    groups: Sequence[Sequence[Tensor]], flats: Sequence[Tensor], process_group: dist.ProcessGroup
) -> dict[int, Piece]:
    """Return the pieces under ZeRO-1, ZeRO-2 and BF16_Optimizer, by the parameter's id.

    All parameters of a group lie in one flat buffer, and each rank updates an equal part of it. Offsets come from
    addresses, since DeepSpeed's own mapping does not follow the order with round_robin_gradients.
    """
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    places = {}
    for index, (parameters, flat) in enumerate(zip(groups, flats, strict=True)):
        size = flat.numel() // world_size
        for parameter in parameters:
            position = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            places[id(parameter)] = piece_of_buffer(index, rank, size, position, parameter.numel())
    return places


def _select(pairs: Sequence[AdapterPair], places: dict[int, Piece], kind: str) -> list[Piece]:
    pieces = []
    for pair in pairs:
        for side, factor in (("lora_A", pair.lora_a), ("lora_B", pair.lora_b)):
            if id(factor) not in places:
                raise ValueError(
                    f"{kind} does not hold {pair.name}.{side}: pass deepspeed.initialize an optimizer or "
                    "model_parameters that contain it"
                )
            pieces.append(places[id(factor)])
    return pieces
