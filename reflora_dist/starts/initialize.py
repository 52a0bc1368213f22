"""Initializations that change the base: both factors are nonzero, and ``W - scaling * B0 A0`` replaces ``W``.

    kaiming_both          both factors Kaiming-uniform: the published RefLoRA for ``warmup_steps=0``, where S must
                          exist from the first step on
    pissa, pissa_niter_N  principal singular vectors of W (PiSSA, arXiv 2404.02948)
    olora                 leading columns of W's QR decomposition (OLoRA, arXiv 2406.01775)
    lora_ga               singular vectors of W's gradient (LoRA-GA, arXiv 2407.05000)

The model computes the same function as before, up to the rounding of W. Checkpoints do not contain the base, so each
contains the initial factors. A resumed run uses them to repeat the change to the bit, under any sharding. The trained
factors alone are no adapter of the original base; ``convert_adapter`` and :func:`export_adapter` make one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoints.adapter_files import save_adapter
from ..checkpoints.start_file import Start, make_mark, mark_of, read_start, saved_mark
from ..collectives.communicator import Communicator
from ..collectives.ranks import is_first_rank, raise_on_all_ranks, world_size
from ..engines.pairs import AdapterPair, find_pairs, find_peft_model
from ..engines.whole_parameters import gather, scatter
from .base_change import subtract_product
from .base_weights import (
    base_checksums,
    base_weight,
    local_blocks,
    rank_holds_base,
    refuse_unsupported,
    stored_transposed,
    whole_shape,
)
from .convert import convert_changed_base
from .recipes import KAIMING_BOTH, check_init, kaiming_both, needs_base, peft_factors, refuse_layers

__all__ = ["export_adapter", "initialize_adapters", "replay_initialization"]

Factors = tuple[Tensor, Tensor]


def initialize_adapters(model: nn.Module, init: str, *, lora_ga_config: Any = None) -> None:
    """Initialize both factors of every adapter with nonzero values, and subtract their product from the base.

    Call once on every rank, after ``get_peft_model(base, LoraConfig(...))`` with PEFT's default initialization and
    before ``deepspeed.initialize``, FSDP1 or DDP. The base may have been built under ``zero.Init``, and FSDP2 may have
    sharded the model already. The factors are rounded to the base's dtype, because an engine may keep them in it.

    Args:
        model: the PEFT model, with a single adapter named "default".
        init: "kaiming_both", "pissa", "pissa_niter_N", "olora" or "lora_ga".
        lora_ga_config: PEFT's ``LoraGAConfig``, for "lora_ga". On the first rank PEFT's ``preprocess_loraga`` must have
            stored its gradients (``_peft_loraga_grad``) in the base layers.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank and before anything changes; the initialization is unknown,
            or the base is quantized, shared with another module or sharded in a way that is not supported.

    Communication: every rank must call. One broadcast per pair and two all-gathers of checksums. PiSSA and OLoRA under
    ``zero.Init`` also gather each base weight once; otherwise no base weight is gathered.
    """
    with raise_on_all_ranks("preparing the initialization"):
        pairs = _prepared(model, init)
        if any(pair.stored_tall for pair in pairs):
            raise ValueError("the adapters are stored tall already: call initialize_adapters before tall_adapters")
        if init == "lora_ga":
            _require_gradients(pairs, lora_ga_config)
    before = base_checksums(pairs)
    factors = _shared_factors(model, pairs, init, lora_ga_config)
    with raise_on_all_ranks("writing the initial factors"):
        owners = {
            f"{index}{side}": owner
            for index, pair in enumerate(pairs)
            for side, owner in zip("AB", pair.owners(), strict=True)
        }
    values = {f"{index}{side}": f for index, both in enumerate(factors) for side, f in zip("AB", both, strict=True)}
    scatter(model, owners, values)
    with raise_on_all_ranks("changing the base"):
        _change_base(pairs, factors)
    after = base_checksums(pairs)
    _mark(model, pairs, init, factors, before, after)


def replay_initialization(model: nn.Module, checkpoint: str | Path) -> None:
    """Repeat the change of the base with which a run began, to continue from one of its checkpoints.

    Call it in place of :func:`initialize_adapters`. It leaves the factors alone; load them from the checkpoint.

    Args:
        model: the PEFT model on the original base, built as for the first run.
        checkpoint: a checkpoint or saved adapter of the run. If it was trained on the original base, nothing happens.

    Raises:
        TypeError, ValueError, FileNotFoundError, RuntimeError: on every rank and before anything changes; the initial
            factors are missing or belong to another run, or training started from another base or another dtype.

    Communication: every rank must call. Two all-gathers of checksums; no base weight or factor is sent.
    """
    with raise_on_all_ranks("opening the initial factors"):
        wanted = saved_mark(checkpoint) is not None
        if wanted:
            start = read_start(checkpoint)
            pairs = _prepared(model, start.init)
            _require_same_pairs(start, pairs, checkpoint)
    if not wanted:
        return
    before = base_checksums(pairs)
    with raise_on_all_ranks("checking the base"):
        _require_original(start, pairs, before)
        factors = [(start.factors[a], start.factors[b]) for a, b in map(_file_keys, pairs)]
        _change_base(pairs, factors)
    after = base_checksums(pairs)
    if dict(zip(map(_layer, pairs), after, strict=True)) != start.after:
        raise RuntimeError("the replayed change of the base is not that of the first run: bits differ; start anew")
    _mark(model, pairs, start.init, factors, before, after)


def export_adapter(model: nn.Module, output_dir: str | Path) -> None:
    """Save an adapter that plain PEFT loads onto the original base.

    It is written as by ``save_adapter``; its r is doubled if the initialization changed the base.

    Args:
        model: the PEFT model, bare or wrapped; under FSDP1 the model that FSDP returned.
        output_dir: a folder that the first rank can write.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: see ``save_adapter`` and :func:`convert_changed_base`.

    Communication: every rank must call. That of ``save_adapter``.
    """
    if mark_of(model) is None:
        save_adapter(model, output_dir)
        return
    trained = Path(output_dir) / ".trained-adapter"
    save_adapter(model, trained)
    with raise_on_all_ranks("converting the adapter"):
        if is_first_rank():
            convert_changed_base(trained, output_dir)
            shutil.rmtree(trained)


# --- checks ---


def _prepared(model: nn.Module, init: str) -> list[AdapterPair]:
    check_init(init)
    peft_model = find_peft_model(model)
    if list(peft_model.peft_config) != ["default"]:
        names = list(peft_model.peft_config)
        raise ValueError(f"the model has the adapters {names}: a change of the base is for one, named 'default'")
    config: Any = peft_model.peft_config["default"]
    present = config.init_lora_weights
    if not isinstance(present, bool):
        raise ValueError(
            f"the base may have been changed already: the adapter was made with init_lora_weights={present!r}; make "
            "it with init_lora_weights=True"
        )
    pairs = find_pairs(peft_model)
    refuse_unsupported(model, pairs)
    for pair in pairs:
        refuse_layers(pair, init)
    return pairs


def _require_gradients(pairs: Sequence[AdapterPair], lora_ga_config: Any) -> None:
    if lora_ga_config is None:
        raise ValueError("init='lora_ga' needs lora_ga_config=LoraGAConfig(...)")
    if lora_ga_config.scale == "weight_svd":
        raise ValueError("lora_ga_config.scale='weight_svd' is not supported: it decomposes the base weights as well")
    for pair in pairs if is_first_rank() else ():
        if getattr(pair.layer.get_base_layer(), "_peft_loraga_grad", None) is None:
            raise ValueError(
                f"the base layer of {pair.name} carries no gradient: run peft's preprocess_loraga(base, config, "
                "train_step) on the first rank before get_peft_model"
            )


def _require_same_pairs(start: Start, pairs: Sequence[AdapterPair], source: Any) -> None:
    present = {_layer(pair): pair.layer.scaling[pair.adapter] for pair in pairs}
    if present != dict(start.scaling):
        differing = sorted(
            name for name in present.keys() | start.scaling.keys() if present.get(name) != start.scaling.get(name)
        )
        name = differing[0]
        raise ValueError(
            f"{source} was trained with other adapters: {name} has scaling {start.scaling.get(name)} there and "
            f"{present.get(name)} here; give the same target modules, r, alpha and rslora"
        )
    for pair in pairs:
        shape = start.factors[_file_keys(pair)[0]].shape
        if shape[0] != pair.lora_rank:
            raise ValueError(
                f"{source} was trained with r={shape[0]} for {pair.name}, this model has r={pair.lora_rank}"
            )


def _require_original(start: Start, pairs: Sequence[AdapterPair], before: Sequence[int]) -> None:
    for pair, value in zip(pairs, before, strict=True):
        name, dtype = _layer(pair), str(base_weight(pair).dtype)
        if dtype != start.base_dtype[name]:
            raise ValueError(
                f"the base was {start.base_dtype[name]} when training began and is {dtype} now: load it as it was"
            )
        if value == start.before[name]:
            continue
        changed = value == start.after[name]
        reason = "it has been changed already; build the model anew" if changed else "load the same base"
        raise ValueError(f"the base weight of {name} is not the one that training began from: {reason}")


# --- the start ---


def _shared_factors(model: nn.Module, pairs: Sequence[AdapterPair], init: str, lora_ga_config: Any) -> list[Factors]:
    """Return the initial factors, the same on every rank.

    If every rank holds the base, the ranks share the decompositions of PiSSA and OLoRA. All other factors come from the
    first rank.
    """
    spread = needs_base(init) and _every_rank_holds_base()
    sources = [index % world_size() if spread else 0 for index in range(len(pairs))]
    rank = dist.get_rank() if dist.is_initialized() else 0
    own: dict[int, Factors] = {}
    error: Exception | None = None
    weights = _whole_weights(model, pairs) if needs_base(init) else ((index, None) for index in range(len(pairs)))
    for index, weight in weights:
        # raise an error only after the loop: the other ranks would wait in the gather of the next weight
        try:
            if init == KAIMING_BOTH:
                own[index] = kaiming_both(pairs[index])  # on every rank, so that their generators stay equal
                continue
            gradient = pairs[index].layer.get_base_layer().__dict__.pop("_peft_loraga_grad", None)
            if sources[index] == rank and error is None:
                own[index] = peft_factors(pairs[index], init, weight, gradient, lora_ga_config)
        except Exception as caught:
            error = caught
    with raise_on_all_ranks("computing the initial factors"):
        if error is not None:
            raise error
    return [
        _broadcast(own.get(index), pair, source)
        for index, (pair, source) in enumerate(zip(pairs, sources, strict=True))
    ]


def _whole_weights(model: nn.Module, pairs: Sequence[AdapterPair]) -> Any:
    owners = {str(index): (pair.layer.get_base_layer(), "weight") for index, pair in enumerate(pairs)}
    for index, weight in gather(model, owners, owners):
        yield int(index), weight


def _every_rank_holds_base() -> bool:
    if world_size() == 1:
        return True
    holds: list[bool] = [False] * world_size()
    dist.all_gather_object(holds, rank_holds_base())
    return all(holds)


def _broadcast(factors: Factors | None, pair: AdapterPair, source: int) -> Factors:
    """Send the factors of one rank to all, rounded to the base's dtype. Communication: one broadcast."""
    dtype = base_weight(pair).dtype if base_weight(pair).dtype != torch.float64 else torch.float32
    shapes = [whole_shape(factor) for factor in (pair.lora_a, pair.lora_b)]
    sizes = [shape.numel() for shape in shapes]
    packed = torch.empty(sum(sizes), dtype=dtype)
    if factors is not None:
        packed = torch.cat([factor.reshape(-1) for factor in factors]).to(dtype)
    if world_size() > 1:
        device = Communicator(dist.group.WORLD, torch.device("cpu")).device
        sent = packed.to(device)
        dist.broadcast(sent, src=source, group=dist.group.WORLD)
        packed = sent.to("cpu")
    lora_a, lora_b = packed.split(sizes)
    return lora_a.view(shapes[0]).clone(), lora_b.view(shapes[1]).clone()


def _change_base(pairs: Sequence[AdapterPair], factors: Sequence[Factors]) -> None:
    """Compute ``W -= scaling * B A`` on this rank's part of each W. Local."""
    for pair, (lora_a, lora_b) in zip(pairs, factors, strict=True):
        left, right = lora_b.flatten(1), lora_a.flatten(1)
        if stored_transposed(pair):
            left, right = right.T, left.T
        for block in local_blocks(pair):
            subtract_product(block, left, right, pair.layer.scaling[pair.adapter])


def _mark(
    model: nn.Module,
    pairs: Sequence[AdapterPair],
    init: str,
    factors: Sequence[Factors],
    before: Sequence[int],
    after: Sequence[int],
) -> None:
    peft_model = find_peft_model(model)
    assert peft_model is not None
    layers = [_layer(pair) for pair in pairs]
    named = {
        key: factor
        for pair, both in zip(pairs, factors, strict=True)
        for key, factor in zip(_file_keys(pair), both, strict=True)
    }
    start = Start(
        init=init,
        scaling={layer: pair.layer.scaling[pair.adapter] for layer, pair in zip(layers, pairs, strict=True)},
        before=dict(zip(layers, before, strict=True)),
        after=dict(zip(layers, after, strict=True)),
        base_dtype={layer: str(base_weight(pair).dtype) for layer, pair in zip(layers, pairs, strict=True)},
        factors=named if is_first_rank() else {},
        mark=make_mark(init, named, dict(zip(layers, before, strict=True))),
    )
    config: Any = peft_model.peft_config["default"]
    config.init_lora_weights = start.mark
    peft_model._reflora_start = start  # type: ignore[assignment]


def _layer(pair: AdapterPair) -> str:
    return pair.name.removesuffix(f".{pair.adapter}")


def _file_keys(pair: AdapterPair) -> tuple[str, str]:
    """Return the names of lora_A and lora_B in the files that PEFT writes."""
    suffix = "" if pair.factor_modules()[0] is pair.layer.lora_embedding_A else ".weight"
    sides = ("lora_embedding_A", "lora_embedding_B") if not suffix else ("lora_A", "lora_B")
    return f"{_layer(pair)}.{sides[0]}{suffix}", f"{_layer(pair)}.{sides[1]}{suffix}"
