"""The search for the engine of any trained PEFT model, also of one without LoRA pairs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from .base import Engine
from .find import find_engine
from .pairs import find_pairs, lora_layers
from .zero import PLAIN_OPTIMIZER, ZeroEngine


def find_training_engine(model: nn.Module, optimizer: Any) -> Engine:
    """Return the engine, recognized by the model's LoRA pairs, or by the trained parameters if it has no LoRA layer.

    Raises:
        TypeError, ValueError: as :func:`find_engine`; also if the model has no trained parameter or the optimizer does
            not hold all of them.
    """
    if lora_layers(model):
        return find_engine(model, optimizer, find_pairs(model))
    engine = find_engine(model, optimizer, ())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"nothing in {type(model).__name__} is trained: give PEFT's adapter a model and activate it")
    if isinstance(engine, ZeroEngine):
        return engine
    if any(hasattr(parameter, "ds_id") for parameter in trained):
        raise ValueError(PLAIN_OPTIMIZER)
    owned = {id(parameter) for group in engine.optimizer.param_groups for parameter in group["params"]}
    if not all(id(parameter) in owned for parameter in trained):
        raise ValueError(
            f"{type(engine.optimizer).__name__} does not hold all that is trained: create it from the model's "
            "parameters after wrapping it, or pass the right one"
        )
    if any(isinstance(parameter.data, DTensor) for parameter in trained):
        engine.name, engine.layout = "fsdp2", "flat"  # without pairs find_engine does not see the DTensors
    return engine
