"""The report of a handle: what attach() found, and figures of the steps so far."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of one rank.

    Attributes:
        method: the configured method.
        engine: "single", "ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3" or "zero1 (BF16_Optimizer)".
        layout: "whole", "tall" (each rank holds rows of the tall factors) or "flat" (some lora_A are stored
            ``[r, in]`` and cut, so every step moves them between ranks).
        world_size: number of ranks in the job.
        num_pairs: number of LoRA adapters that the method acts on.
        lora_ranks: number of pairs by r.
        collectives_per_step: number of collectives by kind in the last optimizer step, without those of forward,
            backward and the engine.
        bytes_per_step: bytes that this rank sent in these collectives; an all-reduce counts 2 (N - 1) / N times its
            payload.
        steps: optimizer steps since the start of training.
        applied_steps: steps in which the method was applied.
        skipped_pairs: pairs left as plain LoRA because the method had no solution, or none that float16 factors can
            hold; for "lora-rite" pairs whose gradient or update was too large; for "lora-muon" pairs with a factor of
            less than full rank, or with too large an update. Summed over the applied steps.
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
        """Return the figures as a JSON-ready dictionary."""
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
