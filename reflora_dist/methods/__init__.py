"""The methods: the mathematics of a step. No ranks and no engines in here."""

from __future__ import annotations

from .base import GradientMethod, RescalingMethod
from .reflora import RefLoRA
from .reflora_s import RefLoRAS

GRADIENT_METHODS: dict[str, GradientMethod] = {"reflora": RefLoRA()}
RESCALING_METHODS: dict[str, RescalingMethod] = {"reflora-s": RefLoRAS()}

__all__ = ["GRADIENT_METHODS", "RESCALING_METHODS", "GradientMethod", "RefLoRA", "RefLoRAS", "RescalingMethod"]
