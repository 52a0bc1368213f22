"""The model with its adapters on the meta device: shapes without values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..algebra.types import SIDE_A, SIDE_B
from ..collectives.tiling import Layout
from ..engines.bare_base import require_no_adapter
from ..engines.pairs import AdapterPair, find_pairs
from ..engines.tall import tall_adapters
from ..files.local_names import require_path_or_hub_name
from ..files.smollm2 import resolve_model
from .options import DoctorOptions
from .values import one_line


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        name: its path in the model.
        shape: its whole shape.
        trainable: whether it belongs to the adapter.
        layer: path of the decoder layer that contains it; empty outside the layers.
        quantizable: whether bitsandbytes packs it: weights of linear layers except the output embedding.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool
    layer: str
    quantizable: bool = False

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclasses.dataclass(frozen=True)
class MetaModel:
    """The model's parameters and pairs, from which the estimates are computed.

    Attributes:
        config: the model's configuration.
        parameters: all parameters.
        pairs: all pairs.
        scale_bytes: bytes of the 4-bit weights' scales and tables, which are stored besides the weights.
        unpacked_numel: elements of the largest 4-bit weight when it is unpacked.
    """

    config: Any
    parameters: list[Parameter]
    pairs: list[AdapterPair]
    scale_bytes: int = 0
    unpacked_numel: int = 0

    @property
    def base(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if not parameter.trainable]

    @property
    def factors(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if parameter.trainable]


def load_config(name: str) -> Any:
    """Return a model's configuration.

    Args:
        name: hub name, folder, file or smollm2.

    Raises:
        ValueError: the configuration cannot be found or read.
    """
    require_path_or_hub_name("model", name)
    name = resolve_model(name)
    require_no_adapter(name, "give the base that it names")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # the type depends on the mistake
        raise ValueError(f"the configuration of {name!r} cannot be read: {one_line(error)}") from error


def build(config: Any, options: DoctorOptions, dtype: torch.dtype, tall: bool = False) -> PeftModel:
    """Return the model with its adapters on the meta device, built as launchers and trainers build it.

    Args:
        config: the model's configuration.
        options: the doctor's options, for the adapter and attention.
        dtype: dtype of the base.
        tall: store lora_A as ``[in, r]`` where possible.

    Raises:
        ValueError: transformers knows no such causal language model, or no layer has one of the target names.
    """
    targets: str | list[str] = options.target_modules
    targets = targets[0] if targets == ["all-linear"] else targets
    arguments = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **arguments)
        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=options.lora_r,
            target_modules=targets,
            target_parameters=options.target_parameters or None,
        )
        model = get_peft_model(model, lora)
        if tall:
            tall_adapters(model)
        return model


def whole_layouts(pairs: Sequence[AdapterPair]) -> list[Layout]:
    """Return the unsharded layout of every factor, lora_A and lora_B alternating."""
    return [pair.whole(side) for pair in pairs for side in (SIDE_A, SIDE_B)]


def layer_classes(model: nn.Module) -> set[str]:
    """Return the class names of the decoder layers, which FSDP wraps and activation checkpointing recomputes."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(getattr(inner, "_no_split_modules", None) or ())


def describe(model: PeftModel) -> MetaModel:
    """List the parameters and pairs of a model.

    Raises:
        ValueError: the model has no adapter, or one that is not supported.
    """
    classes = layer_classes(model)
    layers = [name for name, module in model.named_modules() if type(module).__name__ in classes]
    owner = {f"{layer}.": layer for layer in layers}
    output = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not output]
    weights = {id(module.weight) for module in linear}
    parameters = []
    for name, parameter in model.named_parameters():
        layer = next((found for prefix, found in owner.items() if name.startswith(prefix)), "")
        trainable, quantizable = parameter.requires_grad, not parameter.requires_grad and id(parameter) in weights
        parameters.append(Parameter(name, tuple(parameter.shape), trainable, layer, quantizable))
    return MetaModel(model.config, parameters, find_pairs(model))
