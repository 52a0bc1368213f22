"""Bytes that a rank sends in an optimizer step, by the method and by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..methods.base import RescalingMethod
from ..methods.config import RefLoRAConfig
from ..methods.registry import METHODS
from ..step.traffic import Traffic
from .base_model import MetaModel, Parameter
from .held import BYTES, held_elements, persisted
from .setup import Setup

_GRAM, _FACTOR = 8, 4  # bytes: float64, float32


class Sent(NamedTuple):
    """One kind of message of an optimizer step.

    Attributes:
        what: description of the contents.
        collective: kind of the collective.
        bytes: bytes that a rank sends.
    """

    what: str
    collective: str
    bytes: int


def method_sends(config: RefLoRAConfig, traffic: Traffic, ranks: int) -> list[Sent]:
    """Return what the method sends in a step in which it acts, on the rank that sends most.

    Args:
        config: the method.
        traffic: the method's traffic, for every rank.
        ranks: number of ranks that hold one copy together.
    """
    most = max(range(ranks), key=traffic.sent)
    exchanged = sum(traffic.exchanged(most))
    reduced = "norms" if issubclass(METHODS[config.method], RescalingMethod) else "Gram matrices"
    if config.method == "lora-rite":
        reduced += " and second moments"
    if traffic.flags:
        reduced += " and a flag per pair"
    by_kind = {
        "all_reduce": (reduced, traffic.sent_in_all_reduces),
        "all_gather": ("what each rank has solved", (ranks - 1) * traffic.gathered),
        "send_recv": ("rows that are cut, with neighbours", exchanged),
        "all_to_all": ("lora_A stored [r, in], to one rank and back", exchanged),
    }
    return [Sent(by_kind[kind][0], kind, by_kind[kind][1]) for kind in traffic.collectives]


def _ring(payload: int, ranks: int) -> int:
    return 2 * (ranks - 1) * payload // ranks


def _gather(whole: int, ranks: int) -> int:
    """Return the bytes that a rank sends in a ring's all-gather or reduce-scatter of ``whole`` bytes."""
    return (ranks - 1) * whole // ranks


def method_bytes(config: RefLoRAConfig, lora_ranks: Sequence[int], traffic: Traffic, ranks: int) -> int:
    """Estimate the bytes of the method's Gram matrices, other matrices and buffers, on the rank that holds most."""
    gram = METHODS[config.method].gram_width
    if not gram:
        return 0
    matrices = _GRAM * sum(4 * (gram * r) ** 2 for r in lora_ranks)
    return matrices + ranks * traffic.gathered + max(map(traffic.buffers, range(ranks)))


def engine_traffic(setup: Setup, model: MetaModel) -> list[Sent]:
    """Return what the engine sends in an optimizer step, assuming ring collectives.

    ZeRO-3's result is an upper bound, since it keeps gathered parameters where it can.
    """
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
    cut = [parameter for parameter in model.parameters if parameter.name not in kept]
    gathered = _gather(_padded(setup, cut) * working, ranks)
    sent.append(Sent("parameters for the forward", "all_gather", gathered * setup.accumulation))
    if setup.reshard_after_forward:
        group = setup.secondary_size if setup.secondary_size > 1 else ranks  # ZeRO++ gathers from the second copy
        if not setup.is_zero:  # parameters outside the layers stay gathered or are not needed
            cut = [parameter for parameter in model.parameters if parameter.layer]
        gathered = _gather(_padded(setup, cut) * working, group)
        sent.append(Sent("parameters for the backward", "all_gather", gathered * setup.accumulation))
    if kept:  # after a step DeepSpeed gathers all of them again, also frozen ones
        whole = _padded(setup, [parameter for parameter in model.parameters if parameter.name in kept]) * working
        sent.append(Sent("parameters that stay whole", "all_gather", _gather(whole, ranks)))
    reduced = _padded(setup, model.factors) * working  # accelerate's FSDP reduces in 16 bits too
    sent.append(Sent("gradients of factors", "reduce_scatter", _gather(reduced, ranks) * setup.accumulation))
    if setup.replicas > 1:
        between = _ring(reduced // ranks, setup.replicas)
        sent.append(Sent("gradients of factors, between copies", "all_reduce", between))
    return sent


def _padded(setup: Setup, parameters: Sequence[Parameter]) -> int:
    """Return the elements of parameters on all ranks together, padding included.

    FSDP2 pads a dimension of r rows to one row per rank at least, which can be many times its size.
    """
    if setup.engine == "fsdp1":  # it pads a unit as a whole, not each parameter
        return sum(parameter.numel for parameter in parameters)
    return setup.shard_size * sum(held_elements(setup, parameters))
