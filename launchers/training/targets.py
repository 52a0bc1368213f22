"""Choose the layers and parameters that get an adapter, checked against the model's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
# PEFT cannot adapt these layers: fused kernels read their weights and do not call them.
MAMBA_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
NOT_IN_MAMBA = ["conv1d", "out_proj"]


def adapter_targets(model: Any, names: list[str], parameters: Sequence[str] = ()) -> dict[str, Any]:
    """Return ``target_modules``, ``exclude_modules`` for all-linear, and ``target_parameters`` of a PEFT configuration.

    Args:
        model: the model as transformers made it.
        names: names of layers, or all-linear alone.
        parameters: names of parameters, as those of stacked experts.

    Raises:
        ValueError: no layer, or no parameter, has one of the names. PEFT itself refuses only if no name fits.
    """
    further = {"target_parameters": list(parameters)} if parameters else {}
    known = [path for path, parameter in model.named_parameters() if len(_shape(parameter)) in (2, 3)]
    missing = [name for name in parameters if not any(f".{path}".endswith(f".{name}") for path in known)]
    if missing:
        three_dimensional = [path for path, parameter in model.named_parameters() if len(_shape(parameter)) == 3]
        stacked = ", ".join(sorted({re.sub(r".*\.\d+\.", "", path) for path in three_dimensional}))
        raise ValueError(
            f"target_parameters: {type(model).__name__} has no parameter {', '.join(map(repr, missing))} of two or "
            f"three dimensions; {'its stacked experts are ' + stacked if stacked else 'it has no stacked experts'}"
        )
    if names == [ALL_LINEAR]:
        mamba = model.config.model_type in MAMBA_TYPES
        return {"target_modules": ALL_LINEAR, "exclude_modules": NOT_IN_MAMBA if mamba else None, **further}
    layers = [path for path, _ in model.named_modules()]
    missing = [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if missing:
        raise ValueError(
            f"target_modules: {type(model).__name__} has no layer {', '.join(map(repr, missing))}; give {ALL_LINEAR}, "
            f"or some of its linear layers: {linear_names(model)}"
        )
    return {"target_modules": names, **further}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 has cut it already


def linear_names(model: Any) -> str:
    """Return the names of the linear layers except the head, adapted or not, each once."""
    names = set()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and "lora_" not in path and layer is not model.get_output_embeddings():
            names.add(path.removesuffix(".base_layer").rpartition(".")[2])
    return ", ".join(sorted(names))
