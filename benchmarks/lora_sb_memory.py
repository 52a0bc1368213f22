"""Measure peak memory and time of LoRA-SB's initialization by groups, and with all gradients at once.

The script starts the ranks itself, in fresh processes for each variant and number of ranks:

    python benchmarks/lora_sb_memory.py --output result.json

    training    no initialization: forward and backward of one batch with adapters, for comparison
    by group    ``initialize_lora_sb``: the rows of one decoder layer's gradients at a time
    all at once the published way: all weights trainable, gradients of all batches, then torch's SVDs

Figures are shown only if the variants capture the same energy of the first step.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import models
from benchmarks.harness.options import parse, require_known, require_positive
from reflora_dist.command_line.help import answer_help


@dataclasses.dataclass
class Arguments:
    """The model, the batches and the numbers of ranks."""

    shape: str = dataclasses.field(default="160m", metadata={"help": f"one of {', '.join(models.SHAPES)}"})
    lora_rank: int = dataclasses.field(default=16, metadata={"help": "r"})
    batches: int = dataclasses.field(default=2, metadata={"help": "batches per rank that gradients are the mean of"})
    batch_size: int = dataclasses.field(default=1, metadata={"help": "sequences per batch"})
    seq_len: int = dataclasses.field(default=64, metadata={"help": "tokens per sequence"})
    ranks: list[int] = dataclasses.field(
        default_factory=lambda: [1, 2], metadata={"help": "numbers of ranks, each with the whole model"}
    )
    output: str | None = dataclasses.field(default=None, metadata={"help": "file for the JSON record"})

    def __post_init__(self) -> None:
        require_known(self, shape=models.SHAPES)
        require_positive(self, "lora_rank", "batches", "batch_size", "seq_len")
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"--ranks {self.ranks} must be one or more positive numbers")


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

from benchmarks.harness import engines, recording, timing
from benchmarks.harness.launches import launch_ranks

VARIANTS = ("training", "by group", "all at once")
_RANKS_SCRIPT = Path(__file__).with_name("ranks") / "lora_sb_memory.py"
# Variants sum in different orders, so gradients near zero can differ in sign; and both SVDs are approximations.
ENERGY_TOLERANCE = 0.02


def main() -> None:
    from benchmarks.reports.lora_sb_memory import markdown

    arguments = parse(Arguments)
    device = engines.single_process_device("start it without a launcher: it starts its ranks itself")
    recording.publish("lora_sb_memory", arguments, device, run(arguments), markdown)


def run(arguments: Arguments) -> dict[str, Any]:
    """Measure every variant on every number of ranks.

    Returns:
        ``cells``: per launch its ``variant``, ``ranks``, ``seconds``, ``peak_bytes``, ``added_bytes`` and captured
        ``energy``. ``added_bytes`` is the peak beyond the built model; both are the largest of the ranks.
        ``gradient_bytes``: float32 gradients of all adapted weights. ``shape``: the model's.
    """
    shape = models.SHAPES[arguments.shape]
    cells = []
    with timing.progress(len(VARIANTS) * len(arguments.ranks), "launches") as advance:
        for ranks in arguments.ranks:
            for variant in VARIANTS:
                cells.append({"variant": variant, "ranks": ranks, **launch(arguments, variant, ranks)})
                advance()
            _require_equal_energy(cells[-len(VARIANTS) :])
    elements = sum(inputs * outputs for _, inputs, outputs in shape.adapted_linears())
    return {
        "shape": dataclasses.asdict(shape),
        "gradient_bytes": 4 * elements * shape.num_layers,
        "cells": cells,
    }


def _require_equal_energy(cells: list[dict[str, Any]]) -> None:
    energies = {cell["variant"]: cell["energy"] for cell in cells if cell["energy"] is not None}
    reference = energies["all at once"]
    for variant, energy in energies.items():
        if abs(energy - reference) > ENERGY_TOLERANCE * reference:
            raise RuntimeError(f"{variant} captures {energy:g} of the first step's energy, all at once {reference:g}")


def launch(arguments: Arguments, variant: str, ranks: int) -> dict[str, Any]:
    """Run ``ranks/lora_sb_memory.py`` on ``ranks`` ranks of this machine. Raise RuntimeError if one fails."""
    return launch_ranks(_RANKS_SCRIPT, ranks, {**dataclasses.asdict(arguments), "variant": variant})


if __name__ == "__main__":
    main()
