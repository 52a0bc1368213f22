"""Choose the layers that get an adapter: ``--target_modules``, checked against the model's layers."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
# PEFT cannot adapt these layers: fused kernels read their weights and do not call them.
MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
NOT_IN_MAMBA = ["conv1d", "out_proj"]


def adapter_targets(model: Any, names: list[str]) -> dict[str, Any]:
    """Return ``target_modules``, and ``exclude_modules`` for all-linear, of a PEFT configuration.

    Args:
        model: the model as transformers made it.
        names: names of layers, or all-linear alone.

    Raises:
        ValueError: no layer has one of the names. PEFT itself refuses only if no name fits.
    """
    if names == [ALL_LINEAR]:
        mamba = model.config.model_type in MAMBA_TYPES
        return {"target_modules": ALL_LINEAR, "exclude_modules": NOT_IN_MAMBA if mamba else None}
    layers = [path for path, _ in model.named_modules()]
    missing = [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if missing:
        raise ValueError(
            f"target_modules: {type(model).__name__} has no layer {', '.join(map(repr, missing))}; give {ALL_LINEAR}, "
            f"or some of its linear layers: {linear_names(model)}"
        )
    return {"target_modules": names}


def require_layers(model: Any) -> None:
    """Refuse adapters of stacked experts, which PEFT makes for all-linear and for the names of their former layers.

    Args:
        model: the PEFT model.

    Raises:
        ValueError: the model has such an adapter.
    """
    experts = [path for path, layer in model.named_modules() if isinstance(layer, ParamWrapper)]
    if experts:
        raise ValueError(
            f"target_modules reach the stacked experts or the router of {type(model.get_base_model()).__name__} "
            f"({experts[0]}, ...), for whose adapters no method is made; name some of its other linear layers: "
            f"{linear_names(model)}"
        )


def linear_names(model: Any) -> str:
    """Return the names of the linear layers except the head, adapted or not, each once."""
    names = set()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and "lora_" not in path and layer is not model.get_output_embeddings():
            names.add(path.removesuffix(".base_layer").rpartition(".")[2])
    return ", ".join(sorted(names))
