"""RefLoRAConfig: which method acts on the factors, and at which optimizer steps."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from .registry import METHODS

_DEFAULT_DAMPING = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefLoRAConfig:
    """Settings of RefLoRA (Zhang, Li and Giannakis, NeurIPS 2025) and its relatives.

    Args:
        method: ``"reflora"`` refactors the gradients with the full r x r matrix S, ``"reflora-s"``
            rescales factors and Adam moments with a scalar. ``"scaled-gd"`` preconditions gradients with the inverse
            Gram of the other factor (Riemannian preconditioning), ``"lora-pro"`` replaces them by those whose step is
            closest to full fine-tuning's, ``"lora-rite"`` is an optimizer of its own (:class:`reflora_dist.LoRARite`)
            to which attach gives the factors. ``"lora"`` leaves training as it is and exists for comparisons.
        warmup_steps: optimizer steps of plain LoRA before the method's first. By default 100 for "reflora",
            "reflora-s" and "lora-pro", which do not exist at PEFT's start with ``lora_B = 0``; else 0.
        interval: act at every ``interval``-th optimizer step after the warm-up.
        damping: "scaled-gd" only; delta, which is added to the Grams' diagonal. 1e-2 is PEFT's ``reg``.

    Raises:
        ValueError: a value is out of range, or means nothing to the method.
    """

    method: str = "reflora"
    warmup_steps: int | None = None
    interval: int = 1
    damping: float = _DEFAULT_DAMPING

    def __post_init__(self) -> None:
        if self.method not in METHODS:
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
        if self.damping != _DEFAULT_DAMPING and "damping" not in METHODS[self.method].own_settings:
            raise ValueError(f"damping={self.damping!r} means nothing to method={self.method!r}: leave it out")
        if not METHODS[self.method].has_schedule and (self.warmup_steps or self.interval != 1):
            raise ValueError(
                f"method={self.method!r} is the optimizer itself and acts in every step: leave out "
                f"warmup_steps={self.warmup_steps} and interval={self.interval}"
            )

    def is_due(self, completed_steps: int) -> bool:
        """Whether to refactor when ``completed_steps`` optimizer steps lie behind.

        RefLoRA asks right before step ``completed_steps + 1``, RefLoRA-S right after step
        ``completed_steps`` (and once before the first). Both count as the published implementation does.
        """
        assert self.warmup_steps is not None
        since_warmup = completed_steps - self.warmup_steps
        return METHODS[self.method].acts and since_warmup >= 0 and since_warmup % self.interval == 0

    def as_dict(self) -> dict[str, Any]:
        """The settings as a JSON-ready dictionary."""
        return dataclasses.asdict(self)
