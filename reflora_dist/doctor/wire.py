"""Bytes that ranks send in an optimizer step: the method's collectives, and the engine's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ..config import RefLoRAConfig
from ..methods import GRADIENT_METHODS, RESCALING_METHODS
from ..tiling import LocalShard, tile
from ..update import packed_size
from .base_model import MetaModel
from .held import BYTES, Shards, persisted
from .setup import Setup

_GRAM, _FACTOR = 8, 4  # bytes: float64, float32
_MOST_RANKS = 64  # that are looked at where more hold a factor; neighbours differ by a few elements


class Streams(NamedTuple):
    """What a method sends per factor or pair.

    Attributes:
        there, back: tensors of a factor's size that are re-tiled, and sent back.
        gram: Gram matrices are ``gram x r`` wide.
        per_factor: further float64 values in the all-reduce.
    """

    there: int
    back: int
    gram: int
    per_factor: int


class MethodTraffic(NamedTuple):
    """What a method sends in a step in which it acts.

    Attributes:
        collectives: by kind, per step.
        sent: bytes by rank of one copy, as ``Report.bytes_per_step`` counts them. Where more than 64 ranks hold a
            factor, only a sample of them is complete.
        reduced: bytes of the all-reduce's payload.
        exchanged: by rank, bytes of the all-to-alls.
    """

    collectives: dict[str, int]
    sent: dict[int, int]
    reduced: int
    exchanged: dict[int, int]


class Sent(NamedTuple):
    """Something that the engine itself sends in an optimizer step; bytes per rank."""

    what: str
    collective: str
    bytes: int


def streams(method: str, lora_rank: int) -> Streams:
    """Of a method that acts on gradients, or LoRA-RITE: factors, gradients and moments, as their steps say."""
    if method == "lora-rite":
        return Streams(there=3, back=2, gram=3, per_factor=packed_size(lora_rank) + 1)
    return Streams(there=2, back=1, gram=2 if GRADIENT_METHODS[method].uses_gradients else 1, per_factor=0)


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
        return MethodTraffic({}, nothing, 0, nothing)
    if config.method in RESCALING_METHODS:
        payload = _GRAM * len(shapes)
        return MethodTraffic({"all_reduce": 1}, dict.fromkeys(nothing, _ring(payload, ranks)), payload, nothing)
    payload, there, back = 0, dict(nothing), dict(nothing)
    exchanged = False
    for index, (shape, of_factor) in enumerate(zip(shapes, shards, strict=True)):
        lora_rank = shape[index % 2]
        plan = streams(config.method, lora_rank)
        width = plan.gram * lora_rank
        payload += _GRAM * (width * (width + 1) // 2 + plan.per_factor)
        for rank, (sent, returned) in _moved(index % 2, shape, tuple(of_factor.items())).items():
            exchanged = True
            there[rank] += _FACTOR * plan.there * sent
            back[rank] += _FACTOR * plan.back * returned
    collectives = {"all_reduce": 1}
    if exchanged:
        collectives["all_to_all"] = 3 if config.overlap else 2
    moved = {rank: there[rank] + back[rank] for rank in nothing}
    return MethodTraffic(collectives, {r: _ring(payload, ranks) + moved[r] for r in nothing}, payload, moved)


def _ring(payload: int, ranks: int) -> int:
    return 2 * (ranks - 1) * payload // ranks


def _gather(whole: int, ranks: int) -> int:
    """A ring's all-gather, or reduce-scatter, of so many bytes."""
    return (ranks - 1) * whole // ranks


@functools.lru_cache(maxsize=4096)
def _moved(side: int, shape: tuple[int, int], held: tuple[tuple[int, LocalShard], ...]) -> dict[int, tuple[int, int]]:
    """Per rank the elements of one factor that it sends to others, and sends back; empty if nobody sends any."""
    shards = [shard for _, shard in held]
    count = len(held)
    # not evenly spaced: where a row begins repeats with the rank
    stride = count // _MOST_RANKS + 1
    places = range(count) if count <= _MOST_RANKS else {stride * k % count for k in range(_MOST_RANKS)}
    moved = {}
    for place in places:
        tiling = tile(side, shape, shards, place)
        if tiling.exchanged:
            sent = sum(run.numel for run in tiling.sent if run.peer != place)
            moved[held[place][0]] = (sent, sum(run.numel for run in tiling.arriving if run.peer != place))
    return moved


def buffers(config: RefLoRAConfig, pairs: Sequence[tuple[int, int, int]], setup: Setup) -> int:
    """Bytes of Grams, S, its inverse, and of an exchange: what is sent and received, there. An estimate.

    Args:
        pairs: ``(r, in, out)`` of each.
    """
    if config.method == "lora" or config.method in RESCALING_METHODS:
        return 0
    plan = streams(config.method, max(r for r, _, _ in pairs))
    matrices = 4 * _GRAM * sum((plan.gram * r) ** 2 for r, _, _ in pairs)
    if setup.whole or setup.shard_size == 1:
        return matrices
    share = 1 / setup.shard_size
    if setup.engine == "fsdp2":  # which gives out whole rows of lora_A, of which there are r
        share = max(share, *(1 / r for r, _, _ in pairs))
    return matrices + math.ceil(2 * plan.there * _FACTOR * share * sum(r * n_in for r, n_in, _ in pairs))


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
