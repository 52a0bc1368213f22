"""The options of a prediction, which cost_model.py and scaling.py share."""

from __future__ import annotations

import dataclasses

from benchmarks.harness import models
from benchmarks.harness.options import require_positive


@dataclasses.dataclass(kw_only=True)
class Scenario:
    """The steps to predict."""

    models: list[str] = dataclasses.field(default_factory=lambda: ["7b", "13b", "70b", "405b"])
    gpus: list[int] = dataclasses.field(default_factory=lambda: [8, 64, 512, 4096])
    model_rank: int = dataclasses.field(default=16, metadata={"help": "r of the predicted adapters"})
    tokens_per_gpu: int = dataclasses.field(default=8192, metadata={"help": "tokens of one optimizer step"})
    micro_batches: int = dataclasses.field(default=4, metadata={"help": "backward passes per optimizer step"})

    def __post_init__(self) -> None:
        unknown = [model for model in self.models if model not in models.SHAPES]
        if unknown:
            raise ValueError(f"--models {' '.join(unknown)} unknown; choose from {', '.join(models.SHAPES)}")
        require_positive(self, "model_rank", "tokens_per_gpu", "micro_batches")
        if not self.gpus or min(self.gpus) < 1:
            raise ValueError(f"--gpus {self.gpus} must be one or more positive numbers")
