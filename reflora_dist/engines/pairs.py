"""The LoRA adapters of a PEFT model, as pairs of factors. Nothing here depends on processes or engines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
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

# Wrappers insert these attributes into a module's path. Names without them agree between engines.
WRAPPER_ATTRIBUTES = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}

# In these variants the layer's function depends on the factors only through the product B A. VeLoRA computes lora_A's
# gradient from compressed activations, and S multiplies that.
_SUPPORTED_VARIANTS = (
    *("DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv"),
    *("ALoraLinearVariant", "VeloraLinearVariant"),
)


@dataclasses.dataclass(frozen=True)
class AdapterPair:
    """One LoRA adapter: ``lora_A`` ``[r, in]``, or ``[in, r]`` if it is stored tall, and ``lora_B`` ``[out, r]``.

    A convolution's ``lora_A`` ``[r, channels, *kernel]`` counts as ``[r, channels * prod(kernel)]``, and its 1 x 1
    ``lora_B`` as ``[out, r]``: its update is their product, too. An embedding's update is ``(B A)^T``.

    An adapter of E experts (PEFT's ``target_parameters``) counts as E pairs. Its lora_A is ``[E r, in]``, one expert
    after the other. Its lora_B is ``[out, r E]``, with the expert as the fastest index. Expert e's update is
    ``B_e A_e``, or its transpose, depending on the order of the base parameter.

    Parameters are looked up on every access, since accelerate and FSDP2 replace them when they shard.

    Attributes:
        name: path of the layer without wrappers, then the adapter's name.
        lora_rank: r, of one expert.
        in_features, out_features: in and out, sizes of the whole factors.
        layer: PEFT's LoRA layer.
        adapter: PEFT's name of the adapter.
        experts: E; 1 for every other adapter.
    """

    name: str
    lora_rank: int
    in_features: int
    out_features: int
    layer: LoraLayer
    adapter: str
    experts: int = 1

    @property
    def lora_a(self) -> torch.Tensor:
        return self._factor(SIDE_A)

    @property
    def lora_b(self) -> torch.Tensor:
        return self._factor(SIDE_B)

    @property
    def scaling(self) -> float:
        """The factor s of the update ``s B A``."""
        return float(self.layer.scaling[self.adapter])

    @property
    def of_a_parameter(self) -> bool:
        """Whether the adapter changes a parameter (``target_parameters``) and not a layer."""
        return isinstance(self.layer, ParamWrapper)

    @property
    def width(self) -> int:
        """Number of columns of both tall factors, E r."""
        return self.lora_rank * self.experts

    @property
    def shape_a(self) -> tuple[int, int]:
        """Whole shape of lora_A as PEFT stores it, ``(E r, in)``."""
        return (self.width, self.in_features)

    @property
    def shape_b(self) -> tuple[int, int]:
        """Whole shape of lora_B, ``(out, E r)``."""
        return (self.out_features, self.width)

    @property
    def stored_tall(self) -> bool:
        """Whether lora_A is stored tall, as ``[in, r]`` (``tall_adapters``)."""
        return is_tall(self.factor_modules()[0])

    def whole(self, side: int) -> Layout:
        """Return the layout of a side's factor (SIDE_A or SIDE_B) in one piece, not cut."""
        columns = side == SIDE_A and not self.stored_tall
        rows = self.in_features if side == SIDE_A else self.out_features
        return Layout(rows, self.lora_rank, columns, chunk=rows * self.width, experts=self.experts)

    def _factor(self, side: int) -> torch.Tensor:
        module, name = self.owners()[side]
        return getattr(module, name)

    def owners(self) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        """Return the module that registers lora_A and its name there, then those of lora_B."""
        module_a, module_b = self.factor_modules()
        if isinstance(self.layer, Embedding):
            return (module_a, self.adapter), (module_b, self.adapter)
        module_a = getattr(module_a, "_fsdp_wrapped_module", module_a) if self.stored_tall else module_a
        return (module_a, TALL_NAME if self.stored_tall else "weight"), (module_b, "weight")

    def factor_modules(self) -> tuple[nn.Module, nn.Module]:
        """Return the modules that own lora_A and lora_B; for an embedding, its LoRA layer's two dictionaries."""
        if isinstance(self.layer, Embedding):
            return self.layer.lora_embedding_A, self.layer.lora_embedding_B
        return self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]


def find_pairs(model: nn.Module) -> list[AdapterPair]:
    """Return the active LoRA adapters of a model, in the order of its modules.

    Args:
        model: a model with PEFT LoRA layers, bare or wrapped.

    Raises:
        TypeError: the model is a PeftMixedModel.
        ValueError: no adapter is active, the algebra does not apply to an adapter, two adapters share a factor, or the
            adapter replaced a trained one.
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


def by_expert(pairs: Iterable[AdapterPair]) -> list[AdapterPair]:
    """Return each adapter as often as it has experts: as often as a method finds a pair in it."""
    return [pair for pair in pairs for _ in range(pair.experts)]


def numbers_by_expert(pairs: Iterable[AdapterPair]) -> list[int]:
    """Return the number of the adapter of each pair that :func:`by_expert` lists."""
    return [number for number, pair in enumerate(pairs) for _ in range(pair.experts)]


def _identity(factor: torch.Tensor) -> int:
    """Return an identity of a factor: the address of its memory, or ``id`` if it has no memory.

    Tied factors share an address: PEFT's ensure_weight_tying makes two parameters on the same memory. Sharded
    parameters have no address. Views of a buffer that FSDP1 has freed report one, but their storage is empty.
    """
    address = factor.data_ptr()
    return address if address and factor.untyped_storage().nbytes() else id(factor)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return every LoRA layer, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def active_adapters(layers: list[LoraLayer]) -> list[str | tuple[str, ...]]:
    """Return the name or names of each layer's active adapters. Called in every step, so it has to be fast."""
    return [name if isinstance(name := layer.active_adapter, str) else tuple(name) for layer in layers]


def clean_name(name: str) -> str:
    """Return a module's path without the parts that DDP, DeepSpeed, FSDP1, checkpointing and torch.compile insert."""
    segments = [segment for segment in name.split(".") if segment not in WRAPPER_ATTRIBUTES]
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
            sizes = _sizes(full_name, module, adapter)
            yield AdapterPair(full_name, *sizes, module, adapter, _experts(module))


def _sizes(name: str, layer: LoraLayer, adapter: str) -> tuple[int, int, int]:
    """Return ``(r, in, out)``, read from the modules' attributes, since a sharded weight has lost its shape."""
    _refuse_unsupported(name, layer, adapter)
    factor_a: Any = layer.lora_A[adapter]
    factor_b: Any = layer.lora_B[adapter]
    if hasattr(factor_a, "kernel_size"):
        in_features = factor_a.in_channels * math.prod(factor_a.kernel_size)
        return factor_a.out_channels, in_features, factor_b.out_channels
    return factor_a.out_features // _experts(layer), factor_a.in_features, factor_b.out_features


def _experts(layer: LoraLayer) -> int:
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def _refuse_unsupported(name: str, layer: LoraLayer, adapter: str) -> None:
    if isinstance(layer, MultiheadAttention):
        raise ValueError(
            f"adapter {name} is a {type(layer).__name__} LoRA layer, which is not supported; leave its "
            "module out of target_modules"
        )
    if isinstance(layer.lora_A[adapter], torch.Tensor):  # as in AdaLoRA
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
    """Return the PEFT model inside any wrappers. Frozen PEFT models (references) beside a trained one do not count.

    Raises:
        TypeError: the model contains no PEFT model.
        ValueError: the model contains several PEFT models.
    """
    found = {clean_name(name): module for name, module in model.named_modules() if isinstance(module, PeftModel)}
    if len(found) > 1:
        found = {name: module for name, module in found.items() if _is_trained(module)} or found
    if not found:
        require_plain_peft_model(model)
        raise TypeError(f"{type(model).__name__} contains no PeftModel: wrap the model with peft.get_peft_model(...)")
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(found)} PEFT models ({', '.join(found)}), but adapter files and "
            "checkpoints hold one: pass each PEFT model by itself to save_adapter and load_adapter"
        )
    return next(iter(found.values()))


def _is_trained(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())
