"""What attach() found and what the last steps did, in numbers."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of one rank.

    Attributes:
        method: of the configuration.
        engine: "single", "ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3" or "zero1 (BF16_Optimizer)".
        layout: "whole", "tall" (rows of the tall factors) or "flat" (some lora_A are stored ``[r, in]`` and cut:
            re-tiled at every step).
        world_size: ranks of the job.
        num_pairs: LoRA adapters that the method acts on.
        lora_ranks: the r that occur, and how many pairs have each.
        collectives_per_step: by kind, as issued in the last optimizer step (forward, backward and what the
            engine sends are not in it).
        bytes_per_step: bytes that this rank sent in them; an all-reduce counts 2 (N - 1) / N times its payload.
        steps: optimizer steps since the start of training.
        applied_steps: those of them in which the method was applied.
        skipped_pairs: pairs for which the method had no solution, or none that float16 factors can hold, which left
            them plain LoRA, summed over the applied steps; for "lora-rite" pairs of which a gradient was too large to
            be used, or the update.
    """

    method: str
    engine: str
    layout: str
    world_size: int
    num_pairs: int
    lora_ranks: dict[int, int]
    collectives_per_step: dict[str, int]
    bytes_per_step: int
    steps: int
    applied_steps: int
    skipped_pairs: int

    def as_dict(self) -> dict[str, Any]:
        """The figures as a JSON-ready dictionary."""
        values = dataclasses.asdict(self)
        values["lora_ranks"] = {str(lora_rank): count for lora_rank, count in self.lora_ranks.items()}
        return values

    def __str__(self) -> str:
        ranks = ", ".join(f"{count} x r={lora_rank}" for lora_rank, count in self.lora_ranks.items())
        return (
            f"{self.method} on {self.engine} ({self.layout} factors, {self.world_size} ranks): {self.num_pairs} pairs "
            f"({ranks}), {self.bytes_per_step:,} bytes per step in {self.collectives_per_step or 'no collectives'}, "
            f"applied in {self.applied_steps} of {self.steps} steps, {self.skipped_pairs} pairs skipped"
        )
