"""RefLoRAConfig: which method refactors the factors, and at which optimizer steps."""

from __future__ import annotations

import dataclasses
from typing import Any

METHODS = ("lora", "reflora", "reflora-s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefLoRAConfig:
    """Settings of the refactorization (RefLoRA, Zhang, Li and Giannakis, NeurIPS 2025).

    Args:
        method: ``"reflora"`` refactors the gradients with the full r x r matrix S, ``"reflora-s"``
            rescales factors and Adam moments with a scalar, ``"lora"`` leaves training as it is and
            exists for comparisons.
        warmup_steps: optimizer steps of plain LoRA before the first refactorization. PEFT starts with
            ``lora_B = 0``, where S does not exist.
        interval: refactor at every ``interval``-th optimizer step after the warm-up.
        overlap: "reflora" only; form and sum the Grams of the next step right after an update, on a GPU beside the next
            forward, so that a step only waits for the gradients of lora_A to be re-tiled. Takes a second communicator,
            and changes no result.

    Raises:
        ValueError: a value is out of range.
    """

    method: str = "reflora"
    warmup_steps: int = 100
    interval: int = 1
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        for name, least in (("warmup_steps", 0), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")

    def is_due(self, completed_steps: int) -> bool:
        """Whether to refactor when ``completed_steps`` optimizer steps lie behind.

        RefLoRA asks right before step ``completed_steps + 1``, RefLoRA-S right after step
        ``completed_steps`` (and once before the first). Both count as the published implementation does.
        """
        since_warmup = completed_steps - self.warmup_steps
        return self.method != "lora" and since_warmup >= 0 and since_warmup % self.interval == 0

    def as_dict(self) -> dict[str, Any]:
        """The settings as a JSON-ready dictionary."""
        return dataclasses.asdict(self)
