"""The methods: the mathematics of a step. No ranks and no engines in here; README.md tells how to add one."""

from __future__ import annotations

from .base import GradientMethod, RescalingMethod
from .lora_pro import LoRAPro
from .reflora import RefLoRA
from .reflora_s import RefLoRAS
from .scaled_gd import ScaledGD

GRADIENT_METHODS: dict[str, type[GradientMethod]] = {"reflora": RefLoRA, "scaled-gd": ScaledGD, "lora-pro": LoRAPro}
RESCALING_METHODS: dict[str, type[RescalingMethod]] = {"reflora-s": RefLoRAS}

__all__ = ["GRADIENT_METHODS", "RESCALING_METHODS", "GradientMethod", "RescalingMethod"]
