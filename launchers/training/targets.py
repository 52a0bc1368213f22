"""Which layers of a model get an adapter: ``--target_modules``, held to the names that the model has."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
# PEFT adapts neither: the fused kernels of these models read the weights and pass over the layers.
MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
NOT_IN_MAMBA = ["conv1d", "out_proj"]


def adapter_targets(model: Any, names: list[str]) -> dict[str, Any]:
    """``target_modules``, and ``exclude_modules`` where all-linear has to leave some out, for a PEFT configuration.

    Args:
        model: as transformers made it.
        names: of layers, or all-linear alone.

    Raises:
        ValueError: the model has no layer of one of the names. PEFT itself would refuse only if none fits.
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
    """Refuse adapters of stacked experts, for which PEFT takes all-linear and the names of their former layers.

    Args:
        model: the PEFT model.

    Raises:
        ValueError: there is such an adapter.
    """
    experts = [path for path, layer in model.named_modules() if isinstance(layer, ParamWrapper)]
    if experts:
        raise ValueError(
            f"target_modules reach the stacked experts or the router of {type(model.get_base_model()).__name__} "
            f"({experts[0]}, ...), for whose adapters no method is made; name some of its other linear layers: "
            f"{linear_names(model)}"
        )


def linear_names(model: Any) -> str:
    """The names of the linear layers but the head, adapted or not, each once."""
    names = set()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and "lora_" not in path and layer is not model.get_output_embeddings():
            names.add(path.removesuffix(".base_layer").rpartition(".")[2])
    return ", ".join(sorted(names))
