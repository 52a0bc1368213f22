"""The engine of any trained PEFT model, for what concerns its parameters and not pairs of factors."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from .base import Engine
from .find import find_engine
from .pairs import find_pairs, lora_layers
from .zero import PLAIN_OPTIMIZER, ZeroEngine


def find_training_engine(model: nn.Module, optimizer: Any) -> Engine:
    """Recognize the engine: by its LoRA pairs if the model has any, else by what is trained.

    Raises:
        TypeError, ValueError: as :func:`find_engine`; or nothing is trained, or not by this optimizer.
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
