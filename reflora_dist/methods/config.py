"""RefLoRAConfig: the method that acts on the factors, and its schedule."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

from .base import GradientMethod
from .names import DEFAULT_DAMPING
from .registry import METHODS


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefLoRAConfig:
    """Settings of RefLoRA (Zhang, Li and Giannakis, NeurIPS 2025) and its relatives.

    Args:
        method: name of the method.

            - ``"reflora"`` refactors the gradients with the full r x r matrix S.
            - ``"reflora-s"`` rescales factors and Adam moments with a scalar.
            - ``"scaled-gd"`` preconditions each gradient with the inverse Gram matrix of the other factor (Riemannian
              preconditioning).
            - ``"lora-pro"`` replaces the gradients by those whose step is closest to full fine-tuning's.
            - ``"lora-rite"`` is an optimizer of its own, :class:`reflora_dist.LoRARite`; attach passes it the factors.
            - ``"lora-muon"`` is one, too, :class:`reflora_dist.LoRAMuon`.
            - ``"balora"`` replaces the factors after every step by balanced ones with the same product.
            - ``"lora"`` leaves training unchanged, for comparisons.
        warmup_steps: optimizer steps of plain LoRA before the method's first. The default is 100 for "reflora",
            "reflora-s" and "lora-pro", which do not exist at PEFT's start with ``lora_B = 0``, 1 for "balora", which
            does not either, and 0 for the others. Where the length of training is known, as in the callback, a default
            takes at most a tenth of it.
        interval: act at every ``interval``-th optimizer step after the warm-up.
        damping: delta, which "scaled-gd" adds to the diagonal of the Gram matrices. 1e-2 is the default of PEFT's
            ``reg``. Other methods do not use it.
        carry_moments: whether Adam's moments become those of the method's coordinates: first moments exactly, second
            ones as far as a diagonal can. "balora" rewrites them with the factors in every step. "reflora" rewrites
            those of the warm-up once, in its first step. The published codes leave them as they are. Other methods do
            not use it.

    Attributes:
        has_default_warmup: whether ``warmup_steps`` is the default, because the user gave no number.

    Raises:
        ValueError: a value is out of range, or the method does not use it.
    """

    method: str = "reflora"
    warmup_steps: int | None = None
    interval: int = 1
    damping: float = DEFAULT_DAMPING
    carry_moments: bool = False
    has_default_warmup: bool = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_default_warmup", self.warmup_steps is None)
        if self.method not in tuple(METHODS):  # a dictionary could not look up a list
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", METHODS[self.method].default_warmup_steps)
        for name, least in (("warmup_steps", 0), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        is_number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if not is_number or not 0 <= self.damping <= sys.float_info.max:
            raise ValueError(f"damping={self.damping!r} must be a number of at least 0, and finite")
        if not isinstance(self.carry_moments, bool):
            raise ValueError(f"carry_moments={self.carry_moments!r} must be True or False")
        owned = frozenset().union(*(method.own_settings for method in METHODS.values()))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            foreign = field.name in owned - METHODS[self.method].own_settings
            if foreign and value != field.default:
                raise ValueError(f"{field.name}={value!r} means nothing to method={self.method!r}: leave it out")
        if self.carry_moments and issubclass(METHODS[self.method], GradientMethod) and not self.warmup_steps:
            raise ValueError(
                f"carry_moments=True with method={self.method!r} is about the moments of the warm-up, and "
                "warmup_steps=0: leave one of them out"
            )
        if not METHODS[self.method].has_schedule and (self.warmup_steps or self.interval != 1):
            raise ValueError(
                f"method={self.method!r} is the optimizer itself and acts in every step: leave out "
                f"warmup_steps={self.warmup_steps} and interval={self.interval}"
            )

    def is_due(self, completed_steps: int) -> bool:
        """Return whether the method acts after ``completed_steps`` optimizer steps.

        RefLoRA acts right before step ``completed_steps + 1``. RefLoRA-S and BaLoRA act right after step
        ``completed_steps``, and may act once before the first. All count steps as the published implementations do.
        """
        assert self.warmup_steps is not None
        since_warmup = completed_steps - self.warmup_steps
        return METHODS[self.method].acts and since_warmup >= 0 and since_warmup % self.interval == 0

    def for_steps(self, steps: int) -> RefLoRAConfig:
        """Return the settings for a training of so many optimizer steps.

        A default warm-up becomes the smaller of itself and a tenth of the steps, rounded up. Anything else stays.
        """
        if not self.has_default_warmup:
            return self
        assert self.warmup_steps is not None
        return dataclasses.replace(self, warmup_steps=min(self.warmup_steps, math.ceil(steps / 10)))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-ready dictionary."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
