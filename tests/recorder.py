"""Sees the collectives that a handle issues, below the package: as operations of torch's dispatcher."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from reflora_dist import Handle
from reflora_dist.solving import message_values

_KINDS = {"allreduce_": "all_reduce", "alltoall_base_": "all_to_all"}


@dataclasses.dataclass
class Step:
    """The collectives of one optimizer step: how many of each kind, and the bytes that this rank sent."""

    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    exchanged_elements: int = 0


class CollectiveRecorder(TorchDispatchMode):
    """Counts every c10d operation between the moment a handle's hooks begin and the moment they end.

    Args:
        handle: whose optimizer's hooks to stand around. The forward, the backward and what the engine sends on its
            own lie outside.
    """

    def __init__(self, handle: Handle) -> None:
        super().__init__()
        self.steps: list[Step] = []
        engine = handle._engine
        self._group = engine.group
        optimizer: Any = engine.optimizer
        pre_hooks, post_hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        begin = optimizer.register_step_pre_hook(lambda *_: self._begin(engine, is_pre_hook=True))
        pre_hooks.move_to_end(begin.id, last=False)
        if handle.config.method != "lora-rite":  # which acts in the step itself; the others in the hooks alone
            optimizer.register_step_pre_hook(lambda *_: self.__exit__(None, None, None))
            begin = optimizer.register_step_post_hook(lambda *_: self._begin(engine, is_pre_hook=False))
            post_hooks.move_to_end(begin.id, last=False)
        optimizer.register_step_post_hook(lambda *_: self.__exit__(None, None, None))

    def _begin(self, engine: Any, is_pre_hook: bool) -> None:
        if is_pre_hook and engine.firing().first:
            self.steps.append(Step())
        self.__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            step = self.steps[-1]
            kind = _KINDS.get(name, name)
            step.calls[kind] = step.calls.get(kind, 0) + 1
            self._count_bytes(step, kind, args)
        return func(*args, **(kwargs or {}))

    def _count_bytes(self, step: Step, kind: str, args: tuple) -> None:
        world_size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        if kind == "all_reduce":
            step.bytes += sum(2 * (world_size - 1) * t.numel() * t.element_size() // world_size for t in args[0])
        elif kind == "all_to_all":
            sent, send_counts = args[1], args[4]
            elements = sum(count for other, count in enumerate(send_counts) if other != rank)
            step.exchanged_elements += elements
            step.bytes += elements * sent.element_size()


def check_collectives(handle: Handle, steps: list[Step]) -> None:
    """What was seen equals what ``handle.report()`` says, and is no more than a step may issue.

    Two all-to-alls per firing where factors are cut, for LoRA-RITE two in all; one all-reduce where they are not, for
    LoRA-RITE in any case, for LoRA-Pro one per firing of the optimizer; nothing at all where ranks hold them whole;
    never another kind (an all-gather above all). The exchange carries at most 3 numel(A) / N elements per rank (weights
    and gradients, and gradients back; LoRA-RITE its moments both ways, and weights back, too), give or take one lora_A,
    the rows of B that are cut, and messages about all pairs, there and back.
    """
    report, engine, method = handle.report(), handle._engine, handle.config.method
    assert steps[-1].calls == report.collectives_per_step, (method, steps[-1].calls, report)
    assert steps[-1].bytes == report.bytes_per_step
    firings = len(getattr(engine, "_buffers", [])) if engine.name.startswith("zero") else 1
    if "BF16" in engine.name:
        firings = 1
    allowed = {
        "all_reduce": firings if method == "lora-pro" else 1,
        "all_to_all": 2 if method == "lora-rite" else 2 * firings,
    }
    if engine.group is None or report.world_size == 1:
        allowed = {}
    elif engine.layout == "tall" or method == "reflora-s":
        del allowed["all_to_all"]
    for step in steps:
        assert len(step.calls) <= 1 or method in ("lora-pro", "lora-rite"), step.calls
        assert all(count <= allowed.get(kind, 0) for kind, count in step.calls.items()), step.calls
    applied = [step for step in steps if step.calls]
    assert not allowed or len(applied) == report.applied_steps
    _check_exchanged_elements(handle, report.world_size, steps, channels=5 if method == "lora-rite" else 3)


def _check_exchanged_elements(handle: Handle, world_size: int, steps: list[Step], channels: int) -> None:
    engine = handle._engine
    shards = [shard.numel for shard in engine.shards()]
    # What a rank holds of all lora_A; under ZeRO and FSDP1 this is 1 / N of them, give or take a piece.
    held_a = sum(shards[0::2])
    whole_a = sum(pair.lora_rank * pair.in_features for pair in engine.pairs)
    cut_rows = 2 * sum(pair.lora_rank for pair in engine.pairs) * channels
    largest_a = max(pair.lora_rank * pair.in_features for pair in engine.pairs)
    limit = channels * max(held_a, -(-whole_a // world_size) + largest_a) + cut_rows
    if handle.config.method not in ("lora-pro", "lora-rite"):
        # 8 bytes in elements of 4; an owner answers all ranks but itself
        messages = sum(2 * message_values(pair.lora_rank, True) for pair in engine.pairs)
        limit += messages + (world_size - 1) * (messages // world_size + messages // len(engine.pairs))
    assert all(step.exchanged_elements <= limit for step in steps)
