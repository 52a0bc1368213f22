"""The methods: the mathematics of a step. No ranks and no engines in here."""

from __future__ import annotations

from .base import GradientMethod, RescalingMethod
from .reflora import RefLoRA
from .reflora_s import RefLoRAS

METHODS: dict[str, GradientMethod | RescalingMethod | None] = {
    "lora": None,
    "reflora": RefLoRA(),
    "reflora-s": RefLoRAS(),
}

__all__ = ["METHODS", "GradientMethod", "RefLoRA", "RefLoRAS", "RescalingMethod"]
