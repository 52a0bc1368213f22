"""RefLoRAConfig: the method that acts on the factors, and its schedule."""

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
        method: name of the method.

            - ``"reflora"`` refactors the gradients with the full r x r matrix S.
            - ``"reflora-s"`` rescales factors and Adam moments with a scalar.
            - ``"scaled-gd"`` preconditions each gradient with the inverse Gram matrix of the other factor (Riemannian
              preconditioning).
            - ``"lora-pro"`` replaces the gradients by those whose step is closest to full fine-tuning's.
            - ``"lora-rite"`` is an optimizer of its own, :class:`reflora_dist.LoRARite`; attach passes it the factors.
            - ``"lora-muon"`` is one, too, :class:`reflora_dist.LoRAMuon`.
            - ``"lora"`` leaves training unchanged, for comparisons.
        warmup_steps: optimizer steps of plain LoRA before the method's first. The default is 100 for "reflora",
            "reflora-s" and "lora-pro", which do not exist at PEFT's start with ``lora_B = 0``, and 0 for the others.
        interval: act at every ``interval``-th optimizer step after the warm-up.
        damping: delta, which "scaled-gd" adds to the diagonal of the Gram matrices. 1e-2 is the default of PEFT's
            ``reg``. Other methods do not use it.

    Raises:
        ValueError: a value is out of range, or the method does not use it.
    """

    method: str = "reflora"
    warmup_steps: int | None = None
    interval: int = 1
    damping: float = _DEFAULT_DAMPING

    def __post_init__(self) -> None:
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
        if self.damping != _DEFAULT_DAMPING and "damping" not in METHODS[self.method].own_settings:
            raise ValueError(f"damping={self.damping!r} means nothing to method={self.method!r}: leave it out")
        if not METHODS[self.method].has_schedule and (self.warmup_steps or self.interval != 1):
            raise ValueError(
                f"method={self.method!r} is the optimizer itself and acts in every step: leave out "
                f"warmup_steps={self.warmup_steps} and interval={self.interval}"
            )

    def is_due(self, completed_steps: int) -> bool:
        """Return whether the method acts after ``completed_steps`` optimizer steps.

        RefLoRA acts right before step ``completed_steps + 1``. RefLoRA-S acts right after step ``completed_steps``,
        and may act once before the first. Both count steps as the published implementation does.
        """
        assert self.warmup_steps is not None
        since_warmup = completed_steps - self.warmup_steps
        return METHODS[self.method].acts and since_warmup >= 0 and since_warmup % self.interval == 0

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-ready dictionary."""
        return dataclasses.asdict(self)
