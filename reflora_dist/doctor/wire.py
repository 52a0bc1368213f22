"""Bytes that ranks send in an optimizer step: the method's collectives, and the engine's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..config import RefLoRAConfig
from ..methods import GRADIENT_METHODS, RESCALING_METHODS
from ..solving import message_values
from ..tiling import LocalShard, choose_owners, tile
from ..update import packed_size
from .base_model import MetaModel
from .held import BYTES, Shards, persisted
from .setup import Setup

_GRAM, _FACTOR = 8, 4  # bytes: float64, float32


class Streams(NamedTuple):
    """What a method sends per factor or pair.

    Attributes:
        there, back: tensors of a factor's size that go to the pair's owner, and that come back.
        gram: Gram matrices are ``gram x r`` wide.
        per_factor: further float64 values in the all-reduce.
        messages: between every rank and the pairs' owners, both ways, in place of the all-reduce.
    """

    there: int
    back: int
    gram: int
    per_factor: int = 0
    messages: bool = False


class MethodTraffic(NamedTuple):
    """What a method sends in a step in which it acts.

    Attributes:
        collectives: by kind, per step.
        sent: bytes by rank of one copy, as ``Report.bytes_per_step`` counts them.
        reduced: bytes of the all-reduce's payload.
        exchanged: by rank, bytes of the all-to-alls.
        buffers: by rank, bytes of what it sends to owners, and twice of what it receives as one: as it comes, and
            in blocks.
    """

    collectives: dict[str, int]
    sent: dict[int, int]
    reduced: int
    exchanged: dict[int, int]
    buffers: dict[int, int]


class Sent(NamedTuple):
    """Something that the engine itself sends in an optimizer step; bytes per rank."""

    what: str
    collective: str
    bytes: int


def streams(method: str, lora_rank: int) -> Streams:
    """Of a method that acts on gradients, or LoRA-RITE: factors, gradients and moments, as their steps say."""
    if method == "lora-rite":
        return Streams(there=3, back=2, gram=3, per_factor=packed_size(lora_rank) + 1)
    if GRADIENT_METHODS[method].uses_gradients:
        return Streams(there=2, back=1, gram=2)
    return Streams(there=2, back=1, gram=1, messages=True)


def method_traffic(
    config: RefLoRAConfig, shapes: Sequence[tuple[int, int]], shards: Sequence[Shards], ranks: int
) -> MethodTraffic:
    """Collectives and bytes.

    Args:
        shapes: of whole factors, ``(r, in)`` and ``(out, r)`` alternating.
        shards: as ``factor_shards`` returned them.
        ranks: that hold one copy together.
    """
    nothing = dict.fromkeys(range(ranks), 0)
    if config.method == "lora" or not shards or ranks == 1:
        return MethodTraffic({}, nothing, 0, nothing, nothing)
    if config.method in RESCALING_METHODS:
        payload = _GRAM * len(shapes)
        sent = dict.fromkeys(nothing, _ring(payload, ranks))
        return MethodTraffic({"all_reduce": 1}, sent, payload, nothing, nothing)
    plans = [streams(config.method, shape[index % 2]) for index, shape in enumerate(shapes)]
    exchanged, buffers = dict(nothing), dict(nothing)
    for rank, owner, there, back in _to_owners(plans, shapes, shards, ranks):
        buffers[rank] += there
        buffers[owner] += 2 * there
        if rank != owner:
            exchanged[rank] += there
            exchanged[owner] += back
    collectives, payload = {}, 0
    if cut := any(buffers.values()):
        collectives["all_to_all"] = 4 if config.overlap else 2
    if not (cut and plans[0].messages):
        collectives["all_reduce"] = 1
        widths = [plan.gram * shape[index % 2] for index, (plan, shape) in enumerate(zip(plans, shapes, strict=True))]
        payload = _GRAM * sum(width * (width + 1) // 2 for width in widths)
        payload += _GRAM * sum(plan.per_factor for plan in plans)
    sent = {rank: _ring(payload, ranks) + exchanged[rank] for rank in nothing}
    return MethodTraffic(collectives, sent, payload, exchanged, buffers)


def _to_owners(
    plans: Sequence[Streams], shapes: Sequence[tuple[int, int]], shards: Sequence[Shards], ranks: int
) -> Iterator[tuple[int, int, int, int]]:
    """Per rank and factor or message: the rank, the pair's owner, bytes to the owner and back."""
    nothing = LocalShard(0)
    owners = choose_owners(shapes, [[held.get(rank, nothing) for held in shards] for rank in range(ranks)])
    cut_parts = functools.cache(_cut_parts)  # layers repeat, and so do their shards under most engines
    cut: set[int] = set()
    for index, (plan, shape, held) in enumerate(zip(plans, shapes, shards, strict=True)):
        for rank, numel in cut_parts(index % 2, shape, tuple(held.items())).items():
            cut.add(index)
            yield rank, owners[index // 2], _FACTOR * plan.there * numel, _FACTOR * plan.back * numel
    if cut and plans[0].messages:
        keeps_a = not cut.issuperset(range(0, len(shapes), 2))
        for (lora_rank, _), owner in zip(shapes[::2], owners, strict=True):
            message = _GRAM * message_values(lora_rank, keeps_a)
            for rank in range(ranks):
                yield rank, owner, message, message


def _cut_parts(side: int, shape: tuple[int, int], held: tuple[tuple[int, LocalShard], ...]) -> Counter[int]:
    """By rank the elements of one factor that belong at the pair's owner, whoever that is."""
    ranks = [rank for rank, _ in held]
    parts: Counter[int] = Counter()
    for run in tile(side, shape, [shard for _, shard in held], rank=0, owner=0).arriving:
        parts[ranks[run.peer]] += run.numel
    return parts


def _ring(payload: int, ranks: int) -> int:
    return 2 * (ranks - 1) * payload // ranks


def _gather(whole: int, ranks: int) -> int:
    """A ring's all-gather, or reduce-scatter, of so many bytes."""
    return (ranks - 1) * whole // ranks


def method_bytes(config: RefLoRAConfig, lora_ranks: Sequence[int], traffic: MethodTraffic) -> int:
    """Of every pair's Grams, S and its inverse, and of an exchange, on the rank that holds most. An estimate."""
    if config.method == "lora" or config.method in RESCALING_METHODS:
        return 0
    plans = [(r, streams(config.method, r)) for r in lora_ranks]
    matrices = _GRAM * sum(4 * (plan.gram * r) ** 2 for r, plan in plans)
    return matrices + max(traffic.buffers.values())


def engine_traffic(setup: Setup, model: MetaModel) -> list[Sent]:
    """What the engine sends in an optimizer step, by the rule of a ring; ZeRO-3 at most, since it keeps what it can."""
    ranks, working = setup.shard_size, BYTES[setup.precision]
    factors = sum(factor.numel for factor in model.factors)
    if setup.world_size == 1:
        return []
    if setup.whole:
        return [Sent("gradients of factors", "all_reduce", _ring(factors * _FACTOR, setup.world_size))]
    sent = []
    if setup.engine.startswith(("zero1", "zero2")):
        times = 1 if setup.engine.startswith("zero1") else setup.accumulation
        sent.append(Sent("gradients of factors", "all_reduce", times * _ring(factors * working, ranks)))
        sent.append(Sent("updated factors", "all_gather", _gather(factors * working, ranks)))
        return sent
    kept = persisted(setup, model.parameters)
    gathered = sum(parameter.numel for parameter in model.parameters if parameter.name not in kept) * working
    sent.append(Sent("parameters for the forward", "all_gather", _gather(gathered, ranks) * setup.accumulation))
    if setup.reshard_after_forward:
        group = setup.secondary_size if setup.secondary_size > 1 else ranks  # ZeRO++: from the copy within a node
        if not setup.is_zero:  # what lies outside the layers stays gathered, or takes no part in backward
            gathered = sum(parameter.numel for parameter in model.parameters if parameter.layer) * working
        sent.append(Sent("parameters for the backward", "all_gather", _gather(gathered, group) * setup.accumulation))
    if kept:  # DeepSpeed gathers all of them anew, frozen or not
        whole = sum(parameter.numel for parameter in model.parameters if parameter.name in kept) * working
        sent.append(Sent("parameters that stay whole", "all_gather", _gather(whole, ranks)))
    reduced = _gather(factors * working, ranks) * setup.accumulation  # accelerate's FSDP reduces in 16 bits, too
    sent.append(Sent("gradients of factors", "reduce_scatter", reduced))
    if setup.replicas > 1:
        sent.append(
            Sent(
                "gradients of factors, between copies", "all_reduce", _ring(factors * working // ranks, setup.replicas)
            )
        )
    return sent
