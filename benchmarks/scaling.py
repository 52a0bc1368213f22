"""Measure training on 1, 2, 4 ranks with and without RefLoRA, fit a cost model to this machine, and predict.

The script starts the ranks itself, with one launch per number of ranks:

    python benchmarks/scaling.py --output result.json

Weak scaling keeps the batch of a rank, strong scaling the batch of all ranks. Before anything is timed, every engine
must reproduce the losses of the plain single-process RefLoRA. The model of ``cost_model.py`` is fitted to bare
collectives and small steps, and compared with larger steps that it has not seen. With published constants
(``costs/links.py``) it predicts clusters of GPUs.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.costs.scenario import Scenario
from benchmarks.harness import models, names
from benchmarks.harness.options import parse, require_known, require_positive
from reflora_dist.command_line.help import answer_help

ENGINES = tuple(engine for engine in names.ENGINES if engine not in ("single", "fsdp2-shard1"))


@dataclasses.dataclass
class Arguments(Scenario):
    """The measurements on this machine, and the predictions."""

    ranks: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4])
    engines: list[str] = dataclasses.field(
        default_factory=lambda: ["ddp", "fsdp2", "zero3", "fsdp2-flat", "zero3-flat"],
        metadata={"help": f"of {', '.join(ENGINES)}"},
    )
    shape: str = dataclasses.field(default="small", metadata={"help": f"one of {', '.join(models.SHAPES)}"})
    lora_rank: int = 16
    batch_size: int = dataclasses.field(default=1, metadata={"help": "sequences per rank in weak scaling"})
    seq_len: int = 128
    blocks: int = dataclasses.field(default=4, metadata={"help": "blocks of steps with and without the method"})
    steps: int = dataclasses.field(default=3, metadata={"help": "measured steps per block"})
    fit_ranks: list[int] = dataclasses.field(
        default_factory=lambda: [2, 3, 4],
        metadata={"help": "ranks that the cost model is fitted to and checked on; 0 to leave this out"},
    )
    fit_rounds: int = dataclasses.field(default=7, metadata={"help": "measurements of each point of the fit"})
    seed: int = 0
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [engine for engine in self.engines if engine not in ENGINES]
        if unknown or not self.engines:
            raise ValueError(f"--engines {' '.join(unknown)} unknown; choose from {', '.join(ENGINES)}")
        require_known(self, shape=models.SHAPES)
        require_positive(self, "lora_rank", "batch_size", "seq_len", "blocks", "steps", "fit_rounds")
        self._check_ranks()

    def _check_ranks(self) -> None:
        self.fit_ranks = [ranks for ranks in self.fit_ranks if ranks]
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"--ranks {self.ranks} must be one or more positive numbers")
        if any(self.global_batch_size % ranks for ranks in self.ranks):
            raise ValueError(
                f"--ranks {self.ranks}: each must divide the largest times --batch_size ({self.global_batch_size}), "
                "so that strong scaling can share out the batch"
            )
        if any(ranks < 2 for ranks in self.fit_ranks):
            raise ValueError(f"--fit_ranks {self.fit_ranks}: one rank sends nothing; give 2 or more, or 0 for no fit")
        gpus, most = torch.cuda.device_count(), max(*self.ranks, *self.fit_ranks, 1)
        if gpus and most > gpus:
            raise ValueError(
                f"{most} ranks need {most} GPUs, this machine has {gpus}: lower --ranks and --fit_ranks, or set "
                "CUDA_VISIBLE_DEVICES= to measure on the CPU"
            )

    @property
    def global_batch_size(self) -> int:
        """Sequences of all ranks together in strong scaling, equal to weak scaling on the most ranks."""
        return self.batch_size * max(self.ranks)


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

import torch

from benchmarks import cost_model
from benchmarks.costs import events as cost_events
from benchmarks.harness import engines, recording, timing
from benchmarks.harness.launches import launch_ranks

_RANKS_SCRIPT = Path(__file__).with_name("ranks") / "scaling.py"


def main() -> None:
    from benchmarks.reports.scaling import markdown

    arguments = parse(Arguments)
    record = run(arguments, engines.single_process_device("start it without a launcher: it starts its ranks itself"))
    print(markdown(record))
    if arguments.output is not None:
        recording.write_json(arguments.output, record)


def run(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Measure, fit and predict.

    Returns:
        The record. Its ``results`` hold ``training``: the times of both variants and the handle's report, per engine,
        number of ranks and kind of scaling; ``model``: the fitted constants, the points of the fit and the comparison
        with held-out steps, or None without a fit; ``predictions``: see ``cost_model.predict``.
    """
    launches = []
    counts = sorted({*arguments.ranks, *arguments.fit_ranks})
    with timing.progress(len(counts), "launches") as advance:
        for ranks in counts:
            launches.append(launch(arguments, ranks))
            advance()
    cores = os.cpu_count() if device.type == "cpu" else None
    return {
        "benchmark": "scaling",
        **recording.provenance(device),
        "world_size": max(arguments.ranks),
        "arguments": dataclasses.asdict(arguments),
        "results": {
            "cores": cores,
            "training": [cell for measured in launches for cell in measured["training"]],
            "model": fit_and_check(launches, cores) if arguments.fit_ranks else None,
            "predictions": cost_model.predict(arguments),
        },
    }


def launch(arguments: Arguments, ranks: int) -> dict[str, Any]:
    """Run ``ranks/scaling.py`` on ``ranks`` ranks of this machine. Raise RuntimeError if one fails."""
    job = {
        **dataclasses.asdict(arguments),
        "global_batch_size": arguments.global_batch_size,
        "training": ranks in arguments.ranks,
        "fit": ranks in arguments.fit_ranks,
        "fit_steps": bool(arguments.fit_ranks) and ranks == min(arguments.fit_ranks),
    }
    return launch_ranks(_RANKS_SCRIPT, ranks, job)


def fit_and_check(launches: Sequence[dict[str, Any]], cores: int | None) -> dict[str, Any]:
    """Fit the constants to the launches' ``fitted`` points and compare the model with their ``held_out`` ones.

    Returns:
        ``constants`` (seconds per event), and ``fitted`` and ``held_out``: per point the measured times, the model's
        time (``model_seconds``) and ``relative_error``.
    """
    fitted = [_counted(point, cores) for measured in launches for point in measured["fitted"]]
    held_out = [_counted(point, cores) for measured in launches for point in measured["held_out"]]
    constants = cost_events.fit([(point["counts"], point["seconds"]["median"]) for point in fitted])
    for point in (*fitted, *held_out):
        point["model_seconds"] = cost_events.seconds(point["counts"], constants)
        point["relative_error"] = point["model_seconds"] / point["seconds"]["median"] - 1
    return {"constants": constants, "fitted": fitted, "held_out": held_out}


def _counted(point: dict[str, Any], cores: int | None) -> dict[str, Any]:
    """Return a copy of a point. On a CPU its counts include that ranks share cores."""
    counts = point["counts"]
    return {**point, "counts": counts if cores is None else cost_events.on_shared_cores(counts, point["ranks"], cores)}


if __name__ == "__main__":
    main()
