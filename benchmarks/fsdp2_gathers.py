"""Count what FSDP2 itself gathers of lora_A in a forward, by storage. torch pads shards to equal size.

    torchrun --nproc-per-node 4 benchmarks/fsdp2_gathers.py --lora_ranks 2 16 --output result.json

PEFT's lora_A has r rows, and each of N ranks holds ``ceil(r / N)``. If there are fewer rows than ranks, the ranks
without a row send a row of padding. Stored tall, lora_A has as many rows as the linear has inputs. Each lora_A is an
FSDP unit of its own here, so that its all-gather contains nothing else. Counted are the elements that torch's operator
delivers.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import models
from benchmarks.harness.names import BACKENDS
from benchmarks.harness.options import parse, require_known, require_positive
from reflora_dist.command_line.help import answer_help


@dataclasses.dataclass
class Arguments:
    """Sizes of the model and of its adapters."""

    model: str = dataclasses.field(default="small", metadata={"help": f"one of {', '.join(models.SHAPES)}"})
    num_layers: int = 1
    lora_ranks: list[int] = dataclasses.field(default_factory=lambda: [2, 6, 16], metadata={"help": "r"})
    backend: str | None = dataclasses.field(default=None, metadata={"help": "gloo: several ranks share one GPU"})
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        require_known(self, model=models.SHAPES, backend=BACKENDS)
        require_positive(self, "num_layers")
        if not self.lora_ranks or min(self.lora_ranks) < 1:
            raise ValueError(f"--lora_ranks {self.lora_ranks} must be one or more positive numbers")


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from benchmarks.harness import engines, recording
from benchmarks.harness.deliveries import Deliveries
from benchmarks.reports.fsdp2_gathers import markdown
from reflora_dist import tall_adapters
from reflora_dist.engines.pairs import find_pairs


def main() -> None:
    arguments = parse(Arguments)
    device = engines.start(arguments.backend)
    shape = dataclasses.replace(models.SHAPES[arguments.model], num_layers=arguments.num_layers)
    rows = [count(shape, lora_rank, tall, device) for lora_rank in arguments.lora_ranks for tall in (False, True)]
    recording.publish("fsdp2_gathers", arguments, device, {"rows": rows}, markdown)
    engines.finish()


def count(shape: models.ModelShape, lora_rank: int, tall: bool, device: torch.device) -> dict[str, Any]:
    """Count the elements of all lora_A, and those that a forward gathers on this rank. Every rank must call."""
    model = models.build_model(shape, lora_rank, device)
    if tall:
        tall_adapters(model)
    factors = [pair.lora_a.numel() for pair in find_pairs(model)]
    for pair in find_pairs(model):
        fully_shard(pair.factor_modules()[0])
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=device)
    with Deliveries() as deliveries:
        model(input_ids=tokens)
    gathers = [call.numel for call in deliveries.calls if call.kind.startswith("_allgather_base")]
    if len(gathers) != len(factors):
        raise RuntimeError(f"{len(gathers)} all-gathers of {len(factors)} lora_A: {deliveries.calls}")
    return {
        "lora_rank": lora_rank,
        "tall": tall,
        "elements": sum(factors),
        "gathered": sum(gathers),
        "ratio": sum(gathers) / sum(factors),
        "ranks": dist.get_world_size(),
    }


if __name__ == "__main__":
    main()
