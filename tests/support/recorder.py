"""Sees the collectives that a handle issues, below the package: as operations of torch's dispatcher."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from reflora_dist import Handle
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from reflora_dist.step.solver import shares_out

_KINDS = {
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "_allgather_base_": "all_gather",
    "send": "send_recv",
    "recv_": "send_recv",
}


@dataclasses.dataclass
class Step:
    """The collectives of one optimizer step: how many of each kind, and the bytes that this rank sent.

    Of messages from rank to rank not how many there are, but with whom.
    """

    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    peers: set[int] = dataclasses.field(default_factory=set)
    bytes: int = 0
    exchanged_elements: int = 0

    @property
    def kinds(self) -> set[str]:
        return {*self.calls, *(["send_recv"] if self.peers else [])}


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
        if handle.config.method not in METHOD_OPTIMIZERS:  # these act in the step itself, the others in the hooks
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
            if kind == "send_recv":
                step.peers.add(args[2])
            else:
                step.calls[kind] = step.calls.get(kind, 0) + 1
            self._count_bytes(step, name, args)
        return func(*args, **(kwargs or {}))

    def _count_bytes(self, step: Step, name: str, args: tuple) -> None:
        world_size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        if name == "allreduce_":
            step.bytes += sum(2 * (world_size - 1) * t.numel() * t.element_size() // world_size for t in args[0])
        elif name == "_allgather_base_":
            step.bytes += (world_size - 1) * args[1].numel() * args[1].element_size()
        elif name == "alltoall_base_":
            sent, send_counts = args[1], args[4]
            elements = sum(count for other, count in enumerate(send_counts) if other != rank)
            step.exchanged_elements += elements
            step.bytes += elements * sent.element_size()
        elif name == "send":
            step.exchanged_elements += sum(t.numel() for t in args[0])
            step.bytes += sum(t.numel() * t.element_size() for t in args[0])


def check_collectives(handle: Handle, steps: list[Step]) -> None:
    """What was seen equals what ``handle.report()`` says, and is no more than a step may issue.

    One all-reduce, for LoRA-Pro one per firing of the optimizer, where ranks share the factors; nothing at all where
    they hold them whole. An all-gather only where the solve is shared out. With lora_A stored tall no all-to-all: two
    exchanges per firing (for LoRA-RITE, LoRA-Muon and BaLoRA in all) with neighbours, of rows that are cut; never where
    whole rows are sharded. With lora_A flat two all-to-alls in their place, of at most 3 numel(A) / N elements per rank
    (weights and gradients, and gradients back; RefLoRA once the moments of the warm-up both ways; LoRA-RITE its moments
    both ways, and weights back, too; BaLoRA its weights and the moments that it carries along both ways), give or take
    one lora_A and the rows that are cut. Never another kind.
    """
    report, engine, method = handle.report(), handle._engine, handle.config.method
    reported = dict(report.collectives_per_step)
    firings = len(getattr(engine, "_buffers", [])) if engine.name.startswith("zero") else 1
    firings = 1 if "BF16" in engine.name else firings
    exchanges = 2 if method in (*METHOD_OPTIMIZERS, "balora") else 2 * firings
    assert steps[-1].kinds == reported.keys(), (method, steps[-1], report)
    assert reported.pop("send_recv", 0) <= exchanges
    assert steps[-1].calls == reported, (method, steps[-1].calls, report)
    assert steps[-1].bytes == report.bytes_per_step
    allowed = {"all_reduce": firings if method == "lora-pro" else 1}
    if engine.group is None or report.world_size == 1:
        allowed = {}
    elif method not in (*METHOD_OPTIMIZERS, "reflora-s") and shares_out(
        [pair.lora_rank for pair in engine.pairs], handle._comm.world_size, handle._comm.device
    ):
        allowed["all_gather"] = allowed["all_reduce"]
    if engine.layout == "flat" and method != "reflora-s":
        allowed["all_to_all"] = exchanges
    may_cut_rows = engine.name != "fsdp2" and method != "reflora-s"
    # where every rank holds the factors whole, the first step compares gradients once: somebody has to reduce them
    compared = {"all_reduce": 1} if engine.group is None and report.world_size > 1 else {}
    for number, step in enumerate(steps):
        may_issue = allowed if number else {**allowed, **compared}
        assert all(count <= may_issue.get(kind, 0) for kind, count in step.calls.items()), step.calls
        assert not step.peers or (may_cut_rows and len(step.peers) <= 2), step
    applied = [step for step in steps if step.calls]
    assert not allowed or len(applied) == report.applied_steps
    channels = sum(METHODS[method].channels(handle.config))
    first = handle.config.warmup_steps
    for number, step in enumerate(steps):
        # RefLoRA's first step sends two moments both ways if it carries them
        moments = 4 if handle.config.carry_moments and method == "reflora" and number == first else 0
        _check_exchanged_elements(handle, report.world_size, step, channels + moments)


def _check_exchanged_elements(handle: Handle, world_size: int, step: Step, channels: int) -> None:
    engine = handle._engine
    rank = dist.get_rank(engine.group) if engine.group is not None else 0
    layouts = engine.layouts()
    # at either end of each factor's piece a row may be cut
    limit = 2 * channels * sum(layout.lora_rank for layout in layouts)
    if engine.layout == "flat":
        # What a rank holds of all lora_A; under ZeRO and FSDP1 this is 1 / N of them, give or take a piece.
        columns = [layout for layout in layouts if layout.columns]
        held, whole = sum(layout.piece(rank).numel for layout in columns), sum(layout.numel for layout in columns)
        limit += channels * max(held, -(-whole // world_size) + max(layout.numel for layout in columns))
    assert step.exchanged_elements <= limit
