"""Layout of every factor over the ranks, and the memory of a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..collectives.tiling import Layout
from .base_model import MetaModel, Parameter
from .setup import Setup

BYTES = {"no": 4, "bf16": 2, "fp16": 2}
_MASTER = 4  # fp32
_FSDP_ALIGNMENT = 16  # FSDP1 with use_orig_params pads parameters to a multiple of this many bytes
_ZERO_ALIGNMENT = 2  # ZeRO-1/2 pad each rank's part of a flat buffer to a multiple of this many elements


class Item(NamedTuple):
    """One user of memory on the rank that holds most.

    Attributes:
        name: its description.
        bytes: its size on that rank.
        place: "device" or "host".
        counted: True for the exact size of tensors that the engine holds, False for an estimate.
    """

    name: str
    bytes: int
    place: str
    counted: bool


def factor_layouts(setup: Setup, wholes: Sequence[Layout]) -> list[Layout]:
    """Return how the ranks of one copy shard every factor; empty if every rank holds whole factors.

    Args:
        setup: the engine with its settings.
        wholes: the unsharded layouts from ``AdapterPair.whole``, lora_A and lora_B alternating.
    """
    if setup.whole:
        return []
    if setup.engine == "fsdp2":  # Shard(0) cuts as torch.chunk does
        return [whole._replace(chunk=-(-whole.shape[0] // setup.shard_size) * whole.shape[1]) for whole in wholes]
    if setup.engine in ("zero3", "fsdp1"):  # FSDP1: PEFT's policy makes each factor a unit
        return [whole._replace(chunk=-(-whole.numel // setup.shard_size)) for whole in wholes]
    return _slices_of_one_buffer(wholes, setup)


def _slices_of_one_buffer(wholes: Sequence[Layout], setup: Setup) -> list[Layout]:
    """Return the layouts of ZeRO-1/2, which concatenate the factors and give each rank an equal part."""
    order = list(range(len(wholes)))
    if setup.round_robin:
        order = [index for first in range(setup.shard_size) for index in order[first :: setup.shard_size]]
    partition = zero_partition([whole.numel for whole in wholes], setup)
    layouts = list(wholes)
    position = 0
    for index in order:
        layouts[index] = wholes[index]._replace(chunk=partition, offset=position)
        position += wholes[index].numel
        position += (-position) % setup.alignment
    return layouts


def zero_partition(numels: Sequence[int], setup: Setup) -> int:
    """Return how many elements of ZeRO-1/2's flat buffer each rank updates, padding included."""
    padded = [numel + (-numel) % setup.alignment for numel in numels[:-1]] + list(numels[-1:])
    unit = _ZERO_ALIGNMENT * setup.shard_size
    return -(-sum(padded) // unit) * _ZERO_ALIGNMENT


def persisted(setup: Setup, parameters: Sequence[Parameter]) -> set[str]:
    """Return the names of the parameters that ZeRO-3 also keeps whole on every rank, by DeepSpeed's rule."""
    kept: set[str] = set()
    total = 0
    if setup.engine != "zero3":
        return kept
    for parameter in parameters:
        if total + parameter.numel > setup.model_persistence_threshold:
            continue
        if parameter.numel <= setup.persistence_threshold:
            kept.add(parameter.name)
            total += parameter.numel
    return kept


def memory(setup: Setup, model: MetaModel, moments: int, activation_bytes: int, method_bytes: int) -> list[Item]:
    """Return the memory of the rank that holds most, by use; unused items are left out.

    Args:
        setup: the engine with its settings.
        model: the model's parameters.
        moments: number of state tensors of a factor's size that the optimizer keeps.
        activation_bytes: peak bytes of forward and backward.
        method_bytes: bytes of the method's matrices and exchange buffers.
    """
    working = BYTES[setup.precision]
    base = sum(held_elements(setup, model.base)) * working
    parameters = "host" if setup.offload_params else "device"
    items = [Item("base weights", base, parameters, True)]
    if model.scale_bytes:
        unpacked = model.unpacked_numel * working
        items.append(Item("4-bit weights' scales, on every rank", model.scale_bytes, "device", True))
        items.append(Item("a 4-bit weight, unpacked", unpacked, "device", False))
    kept = persisted(setup, model.parameters)
    if kept:
        whole = sum(parameter.numel for parameter in model.parameters if parameter.name in kept)
        items.append(Item("parameters kept whole", whole * working, "device", True))
    items += _zero_factors(setup, model, moments) if setup.is_zero else _plain_factors(setup, model, moments)
    items += _engine_buffers(setup, model)
    items.append(Item("the method's matrices and buffers", method_bytes, "device", False))
    items.append(Item("activations and temporaries", activation_bytes, "device", False))
    return [item for item in items if item.bytes]


def held_elements(setup: Setup, parameters: Sequence[Parameter]) -> list[int]:
    """Return the elements on the first rank, padding included: one entry per parameter, or per FSDP1 unit."""
    ranks = setup.shard_size
    if setup.engine == "zero3":
        return [-(-parameter.numel // ranks) for parameter in parameters]
    if setup.engine == "fsdp2":
        return [-(-p.shape[0] // ranks) * (p.numel // p.shape[0]) for p in parameters]
    if setup.engine == "fsdp1" and not setup.whole:
        units: dict[str, int] = {}
        align = _FSDP_ALIGNMENT // BYTES[setup.precision]
        for parameter in parameters:
            position = units.get(parameter.layer, 0)
            units[parameter.layer] = position + (-position) % align + parameter.numel
        return [-(-numel // ranks) for numel in units.values()]
    return [parameter.numel for parameter in parameters]


def _plain_factors(setup: Setup, model: MetaModel, moments: int) -> list[Item]:
    """Return the factors' memory under DDP and FSDP: in fp32, to which PEFT and accelerate's FSDP cast them."""
    place = "host" if setup.offload_params or setup.offload_optimizer else "device"
    if setup.engine == "fsdp1" and not setup.whole:
        held = sum(-(-factor.numel // setup.shard_size) for factor in model.factors)
    else:
        held = sum(held_elements(setup, model.factors))
    return [
        Item("factors", held * _MASTER, place, True),
        Item("gradients of factors", held * _MASTER, place, False),
        Item("optimizer's moments", moments * held * _MASTER, place, True),
    ]


def _zero_factors(setup: Setup, model: MetaModel, moments: int) -> list[Item]:
    """Return the factors' memory under DeepSpeed: weights in its dtype, and the rank's fp32 masters and moments."""
    working = BYTES[setup.precision]
    numels = [factor.numel for factor in model.factors]
    if setup.engine == "zero3":
        part = sum(-(-numel // setup.shard_size) for numel in numels)
        weights, gradients = sum(held_elements(setup, model.factors)), part
    else:
        part = zero_partition(numels, setup)
        weights = part * setup.shard_size
        gradients = sum(numels) if setup.engine.startswith("zero1") else part
    place = "host" if setup.offload_optimizer else "device"
    return [
        Item("factors, working copy", weights * working, "host" if setup.offload_params else "device", True),
        Item("factors, fp32 masters", part * _MASTER, place, True),
        Item("gradients, as reduced", gradients * working, "device", False),
        Item("gradients, fp32 in the step", part * _MASTER, place, False),
        Item("optimizer's moments", moments * part * _MASTER, place, True),
    ]


def _engine_buffers(setup: Setup, model: MetaModel) -> list[Item]:
    """Return the engine's own memory: gathered parameters and communication buckets."""
    working = BYTES[setup.precision]
    layers: dict[str, int] = {}
    for parameter in model.parameters:
        layers[parameter.layer] = layers.get(parameter.layer, 0) + parameter.numel
    outside = layers.pop("", 0)
    everything = outside + sum(layers.values())
    if setup.is_zero:
        items = [Item("DeepSpeed's reduction buffers", setup.bucket_elements * working, "device", False)]
        if setup.engine == "zero3":
            live = min(setup.max_live_elements, everything)
            items.append(Item("gathered parameters, at most", live * working, "device", False))
        if setup.secondary_size > 1:
            second = everything // setup.secondary_size
            items.append(Item("second copy within a machine", second * working, "device", False))
        return items
    if setup.engine == "ddp":
        numel = sum(factor.numel for factor in model.factors)
        return [Item("DDP's buckets", numel * _MASTER, "device", False)]
    if setup.whole:
        return []
    # the layer that computes, the next one, which is prefetched, and the parameters outside the layers
    live = min(everything, outside + 2 * max(layers.values(), default=0)) if setup.reshard_after_forward else everything
    return [Item("gathered parameters", live * working, "device", False)]


def pair_rows(setup: Setup, model: MetaModel, layouts: list[Layout]) -> list[dict[str, Any]]:
    """Return one table row per group of pairs with equal sizes and layouts.

    Args:
        setup: the engine with its settings.
        model: the model's parameters and pairs.
        layouts: what :func:`factor_layouts` returned.
    """
    kept = persisted(setup, model.parameters)
    whole = [factor.name in kept for factor in model.factors]
    rows: Counter[tuple[Any, ...]] = Counter()
    for index, pair in enumerate(model.pairs):
        texts = [
            _layout(layouts[factor], setup, whole[factor]) if layouts else "whole"
            for factor in (2 * index, 2 * index + 1)
        ]
        rows[pair.lora_rank, pair.in_features, pair.out_features, *texts] += pair.experts
    names = ("lora_rank", "in_features", "out_features", "lora_A", "lora_B")
    return [{"pairs": count, **dict(zip(names, row, strict=True))} for row, count in rows.items()]


def _layout(layout: Layout, setup: Setup, whole: bool) -> str:
    numel, (rows, width) = min(layout.chunk, layout.numel), layout.shape
    holders = layout.holder(layout.numel - 1) - layout.holder(0) + 1
    if setup.engine.startswith(("zero1", "zero2")):
        text = "slice of one flat buffer"  # its position differs between factors
    else:
        unit = f"{numel:,} elements" if numel % width else f"{numel // width:,} of {rows:,} rows"
        text = f"{unit} on {holders} of {setup.shard_size} ranks"
    if layout.columns:
        text = f"[r, in], {text}"
    elif layout.moves:
        text = f"{text}, cut within rows"
    return f"{text}, and kept whole" if whole else text
