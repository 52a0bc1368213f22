"""Measure what RefLoRA adds to the optimizer step and to the training step, beside other ways to its result.

The optimizer step alone, on a model's adapters without their base (CPU or one GPU):

    python benchmarks/overhead.py --model 7b --lora_ranks 16 32

Whole training steps, under an engine:

    torchrun --nproc-per-node 2 benchmarks/overhead.py --scope training --engine zero3

Sharded factors on one GPU that several ranks share:

    torchrun --nproc-per-node 4 benchmarks/overhead.py --model 7b --num_layers 8 --engine fsdp2 --backend gloo

lora_A stored tall, the default for sharded adapters, against PEFT's storage:

    torchrun --nproc-per-node 2 benchmarks/overhead.py --engine fsdp2 --flat --lora_ranks 16 64

All variants act on one model and optimizer (with ``--flat`` on one of each storage), in blocks that take turns. First
they must compute the same gradients. The script prints medians with quartiles, and writes them as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import models
from benchmarks.harness.names import BACKENDS, ENGINES, STEP_ENGINES
from benchmarks.harness.options import parse, require_known, require_positive
from reflora_dist.command_line.help import answer_help

SCOPES = ("step", "training")


@dataclasses.dataclass
class Arguments:
    """Sizes of the model and of the measurement."""

    model: str = dataclasses.field(default="small", metadata={"help": f"one of {', '.join(models.SHAPES)}"})
    num_layers: int | None = dataclasses.field(default=None, metadata={"help": "instead of the model's own number"})
    lora_ranks: list[int] = dataclasses.field(default_factory=lambda: [16], metadata={"help": "r, one run for each"})
    scope: str = dataclasses.field(
        default="step",
        metadata={"help": "step: the optimizer step of adapters alone; training: forward and backward too"},
    )
    engine: str = dataclasses.field(
        default="single",
        metadata={"help": f"one of {', '.join(ENGINES)}; with --scope step of {', '.join(STEP_ENGINES)}"},
    )
    variants: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "those to compare with lora (all that the engine allows)"}
    )
    flat: bool = dataclasses.field(
        default=False, metadata={"help": "also lora and reflora with lora_A as PEFT stores it, on a second model"}
    )
    backend: str | None = dataclasses.field(default=None, metadata={"help": "gloo: several ranks share one GPU"})
    micro_batch_size: int = dataclasses.field(default=4, metadata={"help": "sequences per rank"})
    seq_len: int = 128
    blocks: int = dataclasses.field(default=6, metadata={"help": "blocks of steps per variant, taking turns"})
    steps: int = dataclasses.field(default=8, metadata={"help": "measured steps per block"})
    block_seconds: float = dataclasses.field(
        default=20.0, metadata={"help": "a block of a slow variant has fewer steps, at least one"}
    )
    breakdown: bool = dataclasses.field(default=False, metadata={"help": "also time the phases of a step"})
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        require_known(self, model=models.SHAPES, scope=SCOPES, engine=ENGINES, backend=BACKENDS)
        require_positive(self, "num_layers", "micro_batch_size", "seq_len", "blocks", "steps", "block_seconds")
        if not self.lora_ranks or min(self.lora_ranks) < 1:
            raise ValueError(f"--lora_ranks {self.lora_ranks} must be one or more positive numbers")
        if self.scope == "step" and self.engine not in STEP_ENGINES:
            raise ValueError(f"--engine {self.engine} needs a model to shard: use --scope training")
        if self.engine == "single" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--engine single is one process; use --engine ddp or start it without a launcher")
        if self.flat and not engines.stores_tall(self.engine):
            raise ValueError(f"--flat needs an engine that stores lora_A tall, --engine {self.engine} does not")
        self.variants = variants.choose(self.engine, self.variants)

    @property
    def shape(self) -> models.ModelShape:
        """The model's shape, with the number of layers of the options."""
        shape = models.SHAPES[self.model]
        return shape if self.num_layers is None else dataclasses.replace(shape, num_layers=self.num_layers)

    @property
    def schedule(self) -> Schedule:
        """The numbers of blocks and steps."""
        return Schedule(blocks=self.blocks, steps=self.steps, block_seconds=self.block_seconds)


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

import torch

from benchmarks.harness import engines, recording, timing, variants
from benchmarks.harness.breakdown import BASELINE_PHASES, PHASES, timed_phases
from benchmarks.harness.collectives import Collective
from benchmarks.harness.interleaved import (
    Schedule,
    Times,
    flattened,
    measure_memory,
    measure_times,
    record_collectives,
    run_step,
)
from benchmarks.harness.workloads import OptimizerStep, TrainingStep, Workload
from benchmarks.reports.overhead import markdown
from reflora_dist.methods.registry import METHODS


def main() -> None:
    arguments = parse(Arguments)
    device = engines.start(arguments.backend)
    results = measure(arguments, device)
    recording.publish("overhead", arguments, device, results, markdown)
    engines.finish()


def measure(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Measure one run per r. Return the ``results`` of the record."""
    runs = []
    total = len(arguments.lora_ranks) * arguments.blocks * (len(arguments.variants) + 2 * arguments.flat)
    with timing.progress(total, "blocks of steps") as advance:
        for lora_rank in arguments.lora_ranks:
            runs.append(measure_lora_rank(arguments, lora_rank, device, advance))
            gc.collect()  # DeepSpeed's engines hold themselves in cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()
    resident = timing.peak_memory_bytes(device) if device.type == "cpu" else None
    return {
        "shape": dataclasses.asdict(arguments.shape),
        "stored_tall": engines.stores_tall(arguments.engine),
        "runs": runs,
        "peak_resident_bytes": resident,
    }


def measure_lora_rank(
    arguments: Arguments, lora_rank: int, device: torch.device, advance: Callable[[], None]
) -> dict[str, Any]:
    """Check the variants against each other, then measure memory, times and the phases of a step."""
    workloads, errors = prepare(arguments, lora_rank, device)
    memory = {}
    if device.type == "cuda":
        memory = {name: measure_memory(workload, name, device) for name, workload in workloads.items()}
    calls = record_collectives(workloads["reflora"], "reflora") if "reflora" in workloads else []
    times, bare, placed = measure_times(workloads, arguments.schedule, device, advance, calls)
    figures = {name: summary(times[name], times[plain_variant(name)], arguments.scope) for name in workloads}
    for name, workload in workloads.items():
        method = METHODS.get(name.removesuffix(variants.FLAT))
        is_method = method is not None and method.acts
        figures[name] |= {"memory": memory.get(name), "report": _report(workload, name) if is_method else None}
        if "reflora" in workloads:
            figures[name]["added_over_reflora"] = figures[name]["added_step_ms"] / figures["reflora"]["added_step_ms"]
    phases = measure_breakdowns(arguments, workloads, device) if arguments.breakdown else {}
    return {
        "lora_rank": lora_rank,
        "num_pairs": len(models.LINEARS) * arguments.shape.num_layers,
        "adapter_parameters": adapter_parameters(arguments.shape, lora_rank),
        "largest_relative_error": errors,
        "variants": figures,
        "bare_collectives": bare_collectives(calls, bare, placed, figures),
        "breakdown_ms": phases.pop("reflora", None),
        "other_breakdowns_ms": phases,
    }


def prepare(arguments: Arguments, lora_rank: int, device: torch.device) -> tuple[dict[str, Workload], dict[str, float]]:
    """Return the workload of every variant, checked against the reference, and the relative errors."""
    workloads: dict[str, Workload] = {}
    errors: dict[str, float] = {}
    for suffix, names in (("", arguments.variants), (variants.FLAT, ["lora", "reflora"] if arguments.flat else [])):
        if not names:
            continue
        engine = arguments.engine + suffix
        workload = build(arguments, engine, lora_rank, device)
        run_step(workload)  # creates Adam's moments, which plain LoRA has, too
        found = variants.check_same_result(engine, names, workload.trainee, functools.partial(run_step, workload))
        errors |= {name + suffix: error for name, error in found.items()}
        workloads |= {name + suffix: workload for name in names}
    return workloads, errors


def plain_variant(name: str) -> str:
    """Return the plain LoRA that a variant is compared with, on the same model."""
    return f"lora{variants.FLAT}" if name.endswith(variants.FLAT) else "lora"


def build(arguments: Arguments, engine: str, lora_rank: int, device: torch.device) -> Workload:
    """Build the adapters alone, or the model under its engine."""
    if arguments.scope == "step":
        return OptimizerStep(arguments.shape, lora_rank, device, engine)
    return TrainingStep(
        engine,
        arguments.shape,
        lora_rank,
        device,
        micro_batch_size=arguments.micro_batch_size,
        seq_len=arguments.seq_len,
    )


def _report(workload: Workload, name: str) -> dict[str, Any]:
    """Return the package's own report on a step."""
    with variants.installed(name, workload.trainee) as handle:
        for _ in range(2):
            run_step(workload)
        return handle.report().as_dict()


def adapter_parameters(shape: models.ModelShape, lora_rank: int) -> int:
    """Return the number of elements of all factors."""
    return shape.num_layers * lora_rank * sum(inputs + outputs for _, inputs, outputs in shape.adapted_linears())


def summary(times: Times, plain: Times, scope: str) -> dict[str, Any]:
    """Return medians and quartiles, and what a variant adds to plain LoRA: over all steps, and block by block.

    ``step_ms`` is the optimizer step alone. Steps that do not wait for the device are ``training_step_ms``, or for
    adapters alone ``queued_step_ms``: an optimizer step and the copy of gradients before it.
    """
    whole = "training_step_ms" if scope == "training" else "queued_step_ms"
    figures: dict[str, Any] = {}
    for key, blocks, plain_blocks in (
        ("step_ms", times.step_ms, plain.step_ms),
        (whole, times.whole_step_ms, plain.whole_step_ms),
    ):
        values, plain_values = flattened(blocks), flattened(plain_blocks)
        by_block = [statistics.median(b) - statistics.median(p) for b, p in zip(blocks, plain_blocks, strict=True)]
        figures[key] = timing.spread(values)
        figures[f"added_{key}"] = statistics.median(values) - statistics.median(plain_values)
        figures[f"added_{key}_by_block"] = timing.spread(by_block)
        figures[f"{key}_ratio"] = statistics.median(values) / statistics.median(plain_values)
    return figures


def bare_collectives(
    calls: list[Collective], bare: Times, placed: Times, figures: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the time of RefLoRA's collectives alone, and what RefLoRA adds as a multiple; None if it sends nothing.

    ``step_ms`` is the time of the collectives, issued again and again. ``added_step_ms`` is what they add to plain
    LoRA's optimizer step if each step issues them before the update. Then ranks arrive at different times, and the
    cache holds other data.
    """
    if not calls:
        return None
    spread = timing.spread(flattened(bare.step_ms))
    added = statistics.median(flattened(placed.step_ms)) - figures["lora"]["step_ms"]["median"]
    return {
        "calls": [call.as_dict() for call in calls],
        "step_ms": spread,
        "added_over_bare": figures["reflora"]["added_step_ms"] / spread["median"],
        "added_step_ms": added,
    }


def measure_breakdowns(
    arguments: Arguments, workloads: Mapping[str, Workload], device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the phases of RefLoRA and of gathering whole factors, by variant."""
    ways = {name: workload for name, workload in workloads.items() if name.startswith(("reflora", "gather"))}
    ways.pop("reflora-s", None)
    return {name: measure_breakdown(arguments.steps, workload, device, name) for name, workload in ways.items()}


def measure_breakdown(steps: int, workload: Workload, device: torch.device, name: str) -> dict[str, dict[str, float]]:
    """Return milliseconds by phase of a variant's optimizer step, measured in steps of their own.

    "rest" contains the update. Phases that do not occur are left out.
    """
    by_phase: dict[str, list[float]] = {}
    phases = BASELINE_PHASES if name.startswith("gather") else PHASES
    with variants.installed(name, workload.trainee):
        run_step(workload)
        for _ in range(steps):
            workload.prepare()
            start = timing.now(device)
            with timed_phases(device, phases) as elapsed_ms:
                workload.step()
                total_ms = 1e3 * (timing.now(device) - start)
            for phase, milliseconds in {**elapsed_ms, "rest": total_ms - sum(elapsed_ms.values())}.items():
                by_phase.setdefault(phase, []).append(milliseconds)
    return {phase: timing.spread(by_phase[phase]) for phase in (*phases, "rest") if phase in by_phase}


if __name__ == "__main__":
    main()
