"""What there is to set: the adapter, as PEFT's configurations, and how it is initialized."""

from __future__ import annotations

import dataclasses
import enum
import sys

from peft import PeftConfig

METHODS = ("lora-sb", "lora-xs")


class LoraXSType(str, enum.Enum):  # noqa: UP042  (a key of PEFT's tables, which look strings up)
    """PEFT's name of the method. It is in ``adapter_config.json``, and PEFT's error names it where it is not known."""

    REFLORA_DIST_LORA_XS = "REFLORA_DIST_LORA_XS"


@dataclasses.dataclass
class LoraXSConfig(PeftConfig):
    """The adapter ``s B R A`` of LoRA-XS and LoRA-SB, for ``peft.get_peft_model``. The fields are those of LoraConfig.

    Args:
        r: side of R; every adapter trains r * r values.
        lora_alpha: ``s = lora_alpha / r``; None, as in the papers' code, is s = 1 for every r.
        lora_dropout: of the adapter's input.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: which ``nn.Linear`` to adapt.
        rank_pattern, alpha_pattern: module names or regular expressions with their own r and lora_alpha.
        bias: only "none": biases stay frozen.
        modules_to_save: modules that are trained whole and saved with the adapter.
    """

    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LoraXSType.REFLORA_DIST_LORA_XS  # type: ignore[assignment]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.r < 1:
            raise ValueError(f"r={self.r} must be positive")
        if self.bias != "none":
            raise ValueError(
                f"bias={self.bias!r} is not supported; use 'none', and modules_to_save for what is trained"
            )
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list, not as a string")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASBConfig:
    """How A, B and R are initialized, the same on all ranks.

    Args:
        method: "lora-sb": from the first full-fine-tuning step, ``-learning_rate * sign(mean gradient)``. "lora-xs":
            from the pretrained weights; needs no batch, and the next three fields mean nothing.
        num_batches: per rank; the gradient is the mean over all ranks' batches.
        learning_rate: of that first step; with a linear warm-up, as in the paper, the peak divided by the number of
            warm-up steps. None (only in the callback): this quotient of the Trainer's arguments.
        modules_per_pass: adapted modules whose gradients are collected at a time, every time by one pass over the
            batches. None: those of one decoder layer (one number in their names), 1 or more: as many in order.
        oversampling: of the SVD's range finder; None: r, and at least 16.
        power_iterations: of the SVD's range finder.
        seed: of the SVD's random directions, and of R under "lora-xs".
    """

    method: str = "lora-sb"
    num_batches: int = 8
    learning_rate: float | None = None
    modules_per_pass: int | None = None
    oversampling: int | None = None
    power_iterations: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        for name, least in (("num_batches", 1), ("modules_per_pass", 1), ("oversampling", 0), ("power_iterations", 0)):
            value = getattr(self, name)
            may_be_none = name in ("modules_per_pass", "oversampling")
            if not (value is None and may_be_none) and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        rate = self.learning_rate
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 < rate <= sys.float_info.max):
            raise ValueError(f"learning_rate={rate!r} must be a number above 0, and finite")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be an integer of 64 bits")
