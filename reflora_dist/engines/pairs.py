"""The LoRA adapters of a PEFT model, as pairs of factors. Nothing here knows about ranks or engines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from torch import nn

from ..algebra.types import SIDE_A, SIDE_B
from ..collectives.tiling import Layout
from .bare_base import require_plain_peft_model
from .tall import TALL_NAME, is_tall

# Wrappers put their own attribute into a module's path; names without them agree between engines.
_WRAPPER_SEGMENTS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}

# Variants in which the layer's function depends on the factors only through the product B A.
_SUPPORTED_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv", "ALoraLinearVariant")


@dataclasses.dataclass(frozen=True)
class AdapterPair:
    """One LoRA adapter: ``lora_A`` ``[r, in]``, or ``[in, r]`` if it is stored tall, and ``lora_B`` ``[out, r]``.

    A convolution's ``lora_A`` ``[r, channels, *kernel]`` counts as ``[r, channels * prod(kernel)]`` and
    its 1 x 1 ``lora_B`` as ``[out, r]``: the update is their product all the same. An embedding's update is
    ``(B A)^T``.

    The parameters are looked up on every access: accelerate and FSDP2 replace them when they shard.
    """

    name: str
    lora_rank: int
    in_features: int
    out_features: int
    layer: LoraLayer
    adapter: str

    @property
    def lora_a(self) -> torch.Tensor:
        return self._factor(SIDE_A)

    @property
    def lora_b(self) -> torch.Tensor:
        return self._factor(SIDE_B)

    @property
    def scaling(self) -> float:
        """s of the update ``s B A``."""
        return float(self.layer.scaling[self.adapter])

    @property
    def shape_a(self) -> tuple[int, int]:
        """Whole shape of lora_A as PEFT stores it, ``(r, in)``."""
        return (self.lora_rank, self.in_features)

    @property
    def shape_b(self) -> tuple[int, int]:
        """Whole shape of lora_B, ``(out, r)``."""
        return (self.out_features, self.lora_rank)

    @property
    def stored_tall(self) -> bool:
        """Whether lora_A is stored as ``[in, r]`` (``tall_adapters``)."""
        return is_tall(self.factor_modules()[0])

    def whole(self, side: int) -> Layout:
        """How the factor of a side (SIDE_A or SIDE_B) is stored, all of it in one piece."""
        columns = side == SIDE_A and not self.stored_tall
        rows = self.in_features if side == SIDE_A else self.out_features
        return Layout(rows, self.lora_rank, columns, chunk=rows * self.lora_rank)

    def _factor(self, side: int) -> torch.Tensor:
        module, name = self.owners()[side]
        return getattr(module, name)

    def owners(self) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        """Where lora_A and lora_B are registered: their modules, and their names in these."""
        module_a, module_b = self.factor_modules()
        if isinstance(self.layer, Embedding):
            return (module_a, self.adapter), (module_b, self.adapter)
        module_a = getattr(module_a, "_fsdp_wrapped_module", module_a) if self.stored_tall else module_a
        return (module_a, TALL_NAME if self.stored_tall else "weight"), (module_b, "weight")

    def factor_modules(self) -> tuple[nn.Module, nn.Module]:
        """The modules that own lora_A and lora_B (for an embedding both are its LoRA layer's dictionaries)."""
        if isinstance(self.layer, Embedding):
            return self.layer.lora_embedding_A, self.layer.lora_embedding_B
        return self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]


def find_pairs(model: nn.Module) -> list[AdapterPair]:
    """List the active LoRA adapters of a model, bare or wrapped, in the order of its modules.

    Args:
        model: anything that contains PEFT LoRA layers.

    Raises:
        TypeError: the model is a PeftMixedModel.
        ValueError: there is no active adapter, one of a kind to which the algebra does not apply, or one that took the
            place of a trained one.
    """
    require_plain_peft_model(model)
    pairs = [pair for name, module in model.named_modules() for pair in _pairs_of(name, module)]
    if not pairs:
        raise ValueError(
            f"no active LoRA adapter found in {type(model).__name__}: wrap the model with "
            "peft.get_peft_model(model, LoraConfig(...)) and activate the adapter with set_adapter(...)"
        )
    owners: dict[int, str] = {}
    for pair in pairs:
        for factor in (pair.lora_a, pair.lora_b):
            first = owners.setdefault(_identity(factor), pair.name)
            if first != pair.name:
                raise ValueError(f"adapters {first} and {pair.name} share a factor; tied factors have no own S")
    return pairs


def _identity(factor: torch.Tensor) -> int:
    """By its memory, since PEFT's ensure_weight_tying makes two parameters on one; where it has none, by itself.

    Sharded parameters have no address, and views of a buffer that FSDP1 has freed only look as if they had one.
    """
    address = factor.data_ptr()
    return address if address and factor.untyped_storage().nbytes() else id(factor)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every LoRA layer, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def active_adapters(layers: list[LoraLayer]) -> list[str | tuple[str, ...]]:
    """The name, or names, of each layer's active adapters; asked in every step."""
    return [name if isinstance(name := layer.active_adapter, str) else tuple(name) for layer in layers]


def clean_name(name: str) -> str:
    """A module's path without what DDP, FSDP1, checkpointing and torch.compile put into it."""
    segments = [segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS]
    while segments and segments[0] == "module":  # DistributedDataParallel and DeepSpeedEngine
        segments = segments[1:]
    return ".".join(segments)


def _pairs_of(name: str, module: nn.Module) -> Iterator[AdapterPair]:
    if not isinstance(module, LoraLayer):
        return
    name = clean_name(name)
    if isinstance(module.base_layer, LoraLayer) and not isinstance(module, ParamWrapper):
        raise ValueError(f"{name} holds a LoRA layer inside a LoRA layer: the model was given to PEFT twice")
    for adapter in module.active_adapters:
        full_name = f"{name}.{adapter}"
        if isinstance(module, Embedding):
            if adapter in module.lora_embedding_A:
                sizes = (module.r[adapter], module.in_features, module.out_features)
                yield AdapterPair(full_name, *sizes, module, adapter)
        elif adapter in module.lora_A:
            yield AdapterPair(full_name, *_sizes(full_name, module, adapter), module, adapter)


def _sizes(name: str, layer: LoraLayer, adapter: str) -> tuple[int, int, int]:
    """``(r, in, out)`` from the modules' own attributes, since a sharded weight has lost its shape."""
    _refuse_unsupported(name, layer, adapter)
    factor_a: Any = layer.lora_A[adapter]
    factor_b: Any = layer.lora_B[adapter]
    if hasattr(factor_a, "kernel_size"):
        in_features = factor_a.in_channels * math.prod(factor_a.kernel_size)
        return factor_a.out_channels, in_features, factor_b.out_channels
    return factor_a.out_features, factor_a.in_features, factor_b.out_features


def _refuse_unsupported(name: str, layer: LoraLayer, adapter: str) -> None:
    if isinstance(layer, (MultiheadAttention, ParamWrapper)):
        raise ValueError(
            f"adapter {name} is a {type(layer).__name__} LoRA layer, which is not supported; leave its "
            "module out of target_modules / target_parameters"
        )
    if isinstance(layer.lora_A[adapter], torch.Tensor):  # AdaLoRA's
        raise ValueError(f"adapter {name} is a {type(layer).__name__}, which is not supported; use peft.LoraConfig")
    variant = type(layer.lora_variant.get(adapter)).__name__
    if variant != "NoneType" and not variant.startswith(_SUPPORTED_VARIANTS):
        raise ValueError(f"adapter {name} uses {variant}, which is not supported; use plain LoRA, rsLoRA or DoRA")
    factor_b = layer.lora_B[adapter]
    if getattr(factor_b, "groups", 1) > 1:
        raise ValueError(
            f"adapter {name} adapts a convolution with groups={factor_b.groups}: its update is not one product "
            "B A, so S does not exist; leave it out of target_modules"
        )


def find_peft_model(model: nn.Module) -> PeftModel:
    """The PEFT model inside of any wrappers; beside a trained one those that are frozen (references) do not count.

    Raises:
        TypeError: there is none.
        ValueError: there are several.
    """
    found = {clean_name(name): module for name, module in model.named_modules() if isinstance(module, PeftModel)}
    if len(found) > 1:
        found = {name: module for name, module in found.items() if _is_trained(module)} or found
    if not found:
        require_plain_peft_model(model)
        raise TypeError(f"{type(model).__name__} contains no PeftModel: wrap the model with peft.get_peft_model(...)")
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(found)} PEFT models ({', '.join(found)}), and an adapter's files "
            "and a checkpoint are of one: give save_adapter and load_adapter each by itself"
        )
    return next(iter(found.values()))


def _is_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())
