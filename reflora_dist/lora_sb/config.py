"""The configurations: of the adapter, in PEFT's form, and of its initialization."""

from __future__ import annotations

import dataclasses
import enum
import sys

from peft import PeftConfig

from ..methods.names import LATENT_METHODS as METHODS


class LoraXSType(str, enum.Enum):  # noqa: UP042  (a key of PEFT's tables, which look strings up)
    """PEFT's name of the method, as stored in ``adapter_config.json``."""

    REFLORA_DIST_LORA_XS = "REFLORA_DIST_LORA_XS"


@dataclasses.dataclass
class LoraXSConfig(PeftConfig):
    """The adapter ``s B R A`` of LoRA-XS and LoRA-SB, for ``peft.get_peft_model``.

    The fields have the meaning of PEFT's ``LoraConfig``.

    Args:
        r: size of R ``[r, r]``; every adapter trains r * r values.
        lora_alpha: sets ``s = lora_alpha / r``. None means s = 1 for every r, as in the papers' code.
        lora_dropout: dropout probability of the adapter's input.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: select the ``nn.Linear`` modules to adapt.
        rank_pattern, alpha_pattern: r and lora_alpha for single modules, by module name or regular expression.
        bias: must be "none"; biases stay frozen.
        modules_to_save: modules that are trained in full and saved with the adapter.
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
    """How A, B and R are initialized. The settings must be the same on all ranks.

    Args:
        method: "lora-sb" starts from the first full-fine-tuning step, ``-learning_rate * sign(mean gradient)``.
            "lora-xs" starts from the pretrained weights; it needs no batch and ignores num_batches and learning_rate.
        num_batches: batches per rank; the gradient is the mean over all ranks' batches.
        learning_rate: learning rate of that first step. With a linear warm-up, as in the paper, this is the peak
            divided by the number of warm-up steps. None is allowed only in the callback, which computes this quotient
            from the Trainer's arguments.
        modules_per_pass: number of adapted modules that are initialized together; "lora-sb" makes one pass over the
            batches for each such group. None: the modules of one decoder layer (same number in their names).
        oversampling: further random directions of the SVD's range finder; None: r, at least 16.
        power_iterations: power iterations of the SVD's range finder.
        seed: seed of the SVD's random directions, and of R under "lora-xs".
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
