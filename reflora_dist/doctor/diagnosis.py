"""The diagnosis: from files and options to memory, traffic and findings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ..collectives.tiling import Layout
from ..engines.pairs import by_expert, find_pairs
from ..engines.tall import tall_adapters
from ..methods.registry import METHODS
from ..step.method_optimizers import METHOD_OPTIMIZERS
from ..step.traffic import Traffic
from .activations import activation_bytes
from .base_model import MetaModel, build, describe, layer_classes, load_config, whole_layouts
from .files import is_for_accelerate, read
from .findings import Findings
from .four_bit import four_bit, pack
from .held import BYTES, Item, factor_layouts, memory, pair_rows
from .options import OPTIMIZERS, PRECISIONS, DoctorOptions
from .ranks import compare
from .setup import Setup
from .setups import setup_of
from .values import one_line
from .versions import PackageVersion, check_versions
from .wire import Sent, engine_traffic, method_bytes, method_sends

_GIB = 2**30
_GPU = torch.device("cuda")
_TIGHT = 0.9  # share of a device's memory; CUDA's context, NCCL's buffers and fragmentation need the rest


@dataclasses.dataclass
class Diagnosis:
    """The doctor's result. Parts that could not be determined are None.

    Attributes:
        files: the contents of the configuration files, by path.
        findings: the problems found.
        options: the doctor's options.
        versions: the installed packages.
        setup: the engine with its settings.
        parameters: number of elements of "base" and "factors".
        pairs: the rows that :func:`pair_rows` returns.
        memory: what the rank that holds most needs.
        layouts: the layout of every factor, lora_A and lora_B alternating; empty if every rank holds whole factors.
        traffic: the method's traffic, for every rank.
        method_sends: what the method sends in a step in which it acts, on the rank that sends most.
        engine_sends: what the engine sends in an optimizer step.
        measured: timed collectives, under a launcher.
    """

    files: dict[str, Any]
    findings: Findings
    options: DoctorOptions
    versions: list[PackageVersion] = dataclasses.field(default_factory=list)
    setup: Setup | None = None
    parameters: dict[str, int] | None = None
    pairs: list[dict[str, Any]] | None = None
    memory: list[Item] | None = None
    layouts: list[Layout] | None = None
    traffic: Traffic | None = None
    method_sends: list[Sent] | None = None
    engine_sends: list[Sent] | None = None
    measured: list[dict[str, Any]] | None = None

    def bytes_in(self, place: str) -> int:
        """Bytes per rank on the "device" or the "host"."""
        return sum(item.bytes for item in self.memory or () if item.place == place)

    @property
    def sent_bytes(self) -> int:
        """Bytes that the method sends in a step in which it acts, on the rank that sends most."""
        return sum(sent.bytes for sent in self.method_sends or ())

    @property
    def layout(self) -> str | None:
        """The layout: "whole", "flat" or "tall", as in ``Report.layout``."""
        if self.layouts is None:
            return None
        if not self.layouts:
            return "whole"
        return "flat" if any(layout.columns for layout in self.layouts) else "tall"

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis in types that JSON can represent."""
        setup, traffic = self.setup, self.traffic
        return {
            "ok": not self.findings.failed,
            "findings": [finding._asdict() for finding in self.findings],
            "files": sorted(self.files),
            "options": dataclasses.asdict(self.options),
            "versions": [version._asdict() for version in self.versions],
            "setup": setup and {**dataclasses.asdict(setup), "layout": self.layout},
            "parameters": self.parameters,
            "pairs": self.pairs,
            "memory_per_rank": self.memory and [item._asdict() for item in self.memory],
            "device_bytes_per_rank": self.memory and self.bytes_in("device"),
            "host_bytes_per_rank": self.memory and self.bytes_in("host"),
            "method_sends": traffic
            and {
                "collectives_per_step": traffic.collectives,
                "bytes_per_step": self.sent_bytes,
                "parts": [sent._asdict() for sent in self.method_sends or ()],
            },
            "engine_sends": self.engine_sends and [sent._asdict() for sent in self.engine_sends],
            "measured": self.measured,
        }


def diagnose(configs: Sequence[str], options: DoctorOptions, device: torch.device = _GPU) -> Diagnosis:
    """Predict what a run with these configuration files would do. It does not start the run, and sends nothing.

    Args:
        configs: paths of the files. Several files of one kind must agree; a DeepSpeed and an accelerate file are used
            together; without files the engine is DDP.
        options: the doctor's options, which complete the files.
        device: device type of the run's ranks.
    """
    findings = Findings()
    files = _read(configs, findings)
    result = Diagnosis(files, findings, options)
    for_accelerate = [path for path in files if is_for_accelerate(files[path])]
    for_deepspeed = [path for path in files if path not in for_accelerate]
    for paths in (for_accelerate, for_deepspeed):
        if len(paths) > 1:
            compare("configuration files", {path: files[path] for path in paths}, findings)
    result.versions = check_versions(findings, {"deepspeed"} if for_deepspeed else set())
    model_config = None
    if options.model is not None:
        try:
            model_config = load_config(options.model)
        except ValueError as error:
            findings.error("--model", str(error), "give a hub name, a folder or a config.json")
    else:
        findings.note(
            "--model",
            "is not given: memory, traffic, and the names of layers in the files and in --target_modules have not been "
            "checked",
            "--model NAME_OR_PATH",
        )
    if len(files) == len(set(configs)):
        known = options if model_config is not None else dataclasses.replace(options, model=None)
        result.setup = setup_of(for_accelerate[:1], for_deepspeed[:1], files, known, findings)
    if result.setup is not None:
        sharded = result.setup.engine not in ("single", "ddp")
        result.setup.tall_adapters = sharded and options.tall_adapters
    if result.setup is not None and model_config is not None:
        _estimate(result, result.setup, model_config, device)
    return result


def _read(configs: Sequence[str], findings: Findings) -> dict[str, Any]:
    files = {}
    for path in configs:
        try:
            files[path] = read(path)
        except ValueError as error:
            findings.error(path, str(error), "give DeepSpeed's JSON or accelerate's YAML")
    return files


def _estimate(result: Diagnosis, setup: Setup, model_config: Any, device: torch.device) -> None:
    options, findings = result.options, result.findings
    dtype = getattr(torch, PRECISIONS[setup.precision])
    try:
        built = build(model_config, options, dtype, setup.tall_adapters)
        model = describe(built)
    except Exception as error:  # the libraries raise many types: for wrong settings, or packages that are missing
        findings.error("--model", *_why_not_built(model_config, options, error))
        return
    _check_class_names(built, setup, findings)
    config = options.reflora_config()
    result.layouts = factor_layouts(setup, whole_layouts(model.pairs))
    result.parameters = {
        "base": sum(parameter.numel for parameter in model.base),
        "factors": sum(parameter.numel for parameter in model.factors),
    }
    packing = four_bit(model_config, options, setup.precision, findings)
    if packing is not None:
        model = pack(model, packing, BYTES[setup.precision])
    result.pairs = pair_rows(setup, model, result.layouts)
    result.traffic = Traffic(config, result.layouts, setup.shard_size, device, half=setup.half_gradients)
    result.method_sends = method_sends(config, result.traffic, setup.shard_size)
    result.engine_sends = engine_traffic(setup, model)
    try:
        activations = activation_bytes(model_config, options, setup)
    except ValueError as error:
        activations = 0
        findings.warning("activations", f"not estimated: {error}", "leave room for them")
    lora_ranks = [pair.lora_rank for pair in by_expert(model.pairs)]
    matrices = method_bytes(config, lora_ranks, result.traffic, setup.shard_size)
    moments = setup.moments if setup.moments is not None else OPTIMIZERS[options.optim or "adamw"]
    moments = 2 if options.method in METHOD_OPTIMIZERS else moments
    result.memory = memory(setup, model, moments, activations, matrices)
    _check_adapter(model, setup, options, findings)
    _check_memory(result, setup)
    if packing is not None:
        _check_loading(model, setup, options, findings)
    _check_flat_adapters(result, setup, built, device)


def _why_not_built(model_config: Any, options: DoctorOptions, error: Exception) -> tuple[str, str]:
    """Return message and remedy for a model that could not be built."""
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return (
            f"{type(model_config).__name__} is no causal language model's, and only those are sized",
            "leave --model out: the files are checked all the same",
        )
    remedy = "--attn_implementation sdpa" if isinstance(error, ImportError) and options.attn_implementation else ""
    return f"no adapter can be put into it: {one_line(error)}", remedy or "--target_modules, or correct its config.json"


def _check_class_names(model: torch.nn.Module, setup: Setup, findings: Findings) -> None:
    unknown = sorted(set(setup.class_names) - {type(module).__name__ for module in model.modules()})
    if unknown:
        own = ", ".join(sorted(layer_classes(model)))
        findings.error(
            "fsdp_transformer_layer_cls_to_wrap",
            f"the model has no modules of {', '.join(map(repr, unknown))}",
            f"leave it out, or name {own}" if own else "leave it out",
        )


def _check_adapter(model: MetaModel, setup: Setup, options: DoctorOptions, findings: Findings) -> None:
    part = sum(-(-factor.numel // setup.shard_size) for factor in model.factors)
    if 0 < setup.sub_group_elements < part:
        findings.warning(
            "sub_group_size",
            f"{setup.sub_group_elements:,} is below the {part:,} elements of factors that a rank updates: the "
            "optimizer fires several times per step, and the method's exchanges are repeated each time; the number of "
            "collectives reported here is that of one firing",
            f"sub_group_size of at least {part}",
        )
    of_parameters = [pair for pair in model.pairs if pair.of_a_parameter]
    if of_parameters and setup.engine.startswith("fsdp1"):
        findings.error(
            "fsdp_version",
            f"{of_parameters[0].name} adapts a parameter (target_parameters), which PEFT cannot do under FSDP1",
            "fsdp_version: 2, or name --target_modules without the stacked experts",
        )
    deficient = [pair for pair in model.pairs if pair.lora_rank > min(pair.in_features, pair.out_features)]
    if deficient and options.method not in ("lora", "reflora-s"):
        pair = deficient[0]
        findings.warning(
            "--lora_r",
            f"{options.lora_r} is above in or out of {len(deficient)} pairs ({pair.name}: in={pair.in_features}, "
            f"out={pair.out_features}): S does not exist there, and they are plain LoRA",
            "lower r, there or everywhere",
        )


def _check_flat_adapters(result: Diagnosis, setup: Setup, built: PeftModel, device: torch.device) -> None:
    """Warn of the cost of keeping lora_A as ``[r, in]``. Run it last: it stores the lora_A of ``built`` tall."""
    config, layouts = result.options.reflora_config(), result.layouts or []
    flat = [layout for layout in layouts if layout.columns and layout.moves]
    if not flat or not METHODS[config.method].channels_there:
        return
    cost = (
        f"{len(flat)} of {len(layouts) // 2} lora_A are stored as [r, in] and cut: in every step each goes to one rank "
        f"and back, in messages to every rank. The rank that sends most sends {result.sent_bytes / 1e6:.2f} MB"
    )
    if not tall_adapters(built):
        result.findings.note("adapters", f"{cost}; those of embeddings and convolutions have no tall form")
        return
    stored_tall = factor_layouts(setup, whole_layouts(find_pairs(built)))
    tall = Traffic(config, stored_tall, setup.shard_size, device, half=setup.half_gradients)
    instead = sum(sent.bytes for sent in method_sends(config, tall, setup.shard_size))
    cost += f", {instead / 1e6:.2f} MB if they are stored tall, [in, r]"
    padded = sum(setup.shard_size * layout.chunk for layout in flat) / sum(layout.numel for layout in flat)
    if setup.engine == "fsdp2" and padded > 1:
        cost += f"; and FSDP2 pads them to {padded:.3g} times their size wherever it gathers and reduces them"
    result.findings.warning(
        "--tall_adapters False",
        cost,
        "leave it out: RefLoRACallback and finetune.py store them tall; in a loop of your own call "
        "reflora_dist.tall_adapters(model) after get_peft_model and before wrapping and the optimizer",
    )


def _check_memory(result: Diagnosis, setup: Setup) -> None:
    options, findings = result.options, result.findings
    remedy = "more ranks, ZeRO-3 or FSDP, --activation_checkpointing True, a smaller micro batch, or offload"
    needed, available = result.bytes_in("device") / _GIB, options.gpu_memory_gib
    if available is None:
        findings.note("memory", "there is no GPU here, so it is not known what would fit", "--gpu_memory_gib")
    elif needed > available:
        findings.error(
            "memory",
            f"a rank needs about {needed:.1f} GiB, and a device has {available:g} GiB",
            remedy,
        )
    elif needed > _TIGHT * available:
        findings.warning(
            "memory", f"a rank needs about {needed:.1f} of {available:g} GiB: CUDA and NCCL take some more", remedy
        )
    host = result.bytes_in("host") * setup.ranks_per_node / _GIB
    if options.host_memory_gib is not None and host > options.host_memory_gib:
        findings.error(
            "memory",
            f"a machine's {setup.ranks_per_node} ranks need {host:.1f} GiB of host memory, it has "
            f"{options.host_memory_gib:g} GiB",
            "offload less, or use more machines",
        )


def _check_loading(model: MetaModel, setup: Setup, options: DoctorOptions, findings: Findings) -> None:
    """Check that the unsharded base fits: bitsandbytes packs weights on the device before an engine shards them."""
    loaded = model.scale_bytes + sum(parameter.numel for parameter in model.base) * BYTES[setup.precision]
    if options.gpu_memory_gib is not None and loaded / _GIB > options.gpu_memory_gib:
        findings.error(
            "memory",
            f"every rank loads the whole 4-bit base, {loaded / _GIB:.1f} GiB, before it is sharded, and a device has "
            f"{options.gpu_memory_gib:g} GiB",
            "larger devices, or no --load_in_4bit: a base in 16 bits is sharded as it is loaded",
        )


def to_json(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as JSON text."""
    return json.dumps(diagnosis.as_dict(), indent=2)
