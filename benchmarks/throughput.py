"""Measure tokens per second and device, MFU, step time and memory of plain LoRA and RefLoRA under an engine.

    python benchmarks/throughput.py --model 7b
    torchrun --nproc-per-node 8 benchmarks/throughput.py --model 8b --engine fsdp2 --gradient_checkpointing

The model is built from its configuration with random weights and trains on random tokens, which cost as much as real
ones. The variants take turns on one model and optimizer. Steps within a block run without waiting for each other, as in
training.

MFU is the share of the device's peak rate (dense bfloat16) that the model's own arithmetic uses. FLOPs per token are as
follows, with N parameters in the frozen matrices (without the embedding lookup), N_a in the adapters, L layers,
hidden size h and sequences of s tokens:

    4 N  +  6 N_a  +  6 L h s

Forward and the activations' gradients are 2 N each. Full training has 6 N, because it also computes the weights'
gradients; LoRA does so only for the adapters. Attention is 2 L h s forward (two products over the causal half), and
twice that backward. Recomputed activations and the optimizer's work do not count.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import models
from benchmarks.harness.names import ENGINES
from benchmarks.harness.options import parse, require_known, require_positive
from launchers.screen.foreign import filter_foreign
from reflora_dist.command_line.help import answer_help
from reflora_dist.methods.names import METHOD_NAMES

VARIANTS = (*METHOD_NAMES, "loop")


@dataclasses.dataclass
class Arguments:
    """Sizes of the model and of the measurement."""

    model: str = dataclasses.field(default="small", metadata={"help": f"one of {', '.join(models.SHAPES)}"})
    num_layers: int | None = dataclasses.field(default=None, metadata={"help": "instead of the model's own number"})
    lora_rank: int = 16
    engine: str = dataclasses.field(default="single", metadata={"help": f"one of {', '.join(ENGINES)}"})
    variants: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": f"of {', '.join(VARIANTS)}, those to compare with lora (all)"}
    )
    seq_len: int | None = dataclasses.field(default=None, metadata={"help": "tokens (GPU: 1024, CPU: 128)"})
    micro_batch_size: int = dataclasses.field(default=4, metadata={"help": "sequences per rank and backward"})
    accumulation_steps: int | None = dataclasses.field(
        default=None, metadata={"help": "backwards per optimizer step (GPU: 2, CPU and DeepSpeed: 1)"}
    )
    gradient_checkpointing: bool = dataclasses.field(default=False, metadata={"help": "recompute activations"})
    attn_implementation: str = "sdpa"
    blocks: int = dataclasses.field(default=6, metadata={"help": "blocks of steps per variant, taking turns"})
    steps: int = dataclasses.field(default=4, metadata={"help": "steps per block"})
    peak_tflops: float | None = dataclasses.field(
        default=None, metadata={"help": "10^12 FLOP/s of the device, where its name is not known"}
    )
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        require_known(self, model=models.SHAPES, engine=ENGINES)
        on_gpu = torch.cuda.is_available()
        if self.seq_len is None:
            self.seq_len = 1024 if on_gpu else 128
        if self.accumulation_steps is None:
            self.accumulation_steps = 2 if on_gpu and not self.engine.startswith("zero") else 1
        require_positive(self, "num_layers", "lora_rank", "seq_len", "micro_batch_size", "accumulation_steps")
        require_positive(self, "blocks", "steps", "peak_tflops")
        if self.accumulation_steps > 1 and self.engine.startswith("zero"):
            raise ValueError("--accumulation_steps is not for DeepSpeed here; raise --micro_batch_size instead")
        if self.engine == "single" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--engine single is one process; use --engine ddp or start it without a launcher")
        possible = [name for name in VARIANTS if name in variants.available(self.engine)]
        self.variants = variants.choose(self.engine, self.variants or possible)

    @property
    def shape(self) -> models.ModelShape:
        """The model's shape, with the number of layers of the options."""
        return models.shape_of(self.model, self.num_layers)


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds
    filter_foreign()

import torch

from benchmarks.harness import engines, recording, timing, variants
from benchmarks.harness.interleaved import flattened, run_step
from benchmarks.harness.workloads import TrainingStep
from benchmarks.reports.throughput import markdown

# Dense bfloat16 rates of NVIDIA's data sheets in FLOP/s, without sparsity (half of the rate with it). Keys are words of
# the device's name, and the first key that fits counts.
PEAK_FLOPS: dict[str, float | None] = {
    "MIG": None,  # a slice of a GPU
    "NVL": None,  # other rates than the SXM card; published tables disagree on them
    "H100 PCIe": 756e12,  # "NVIDIA H100 Tensor Core GPU" data sheet, PCIe column
    "H100": 989e12,  # same, SXM column
    "H200": 989e12,  # "NVIDIA H200 Tensor Core GPU" data sheet, SXM column
    "B200": 2250e12,  # "NVIDIA DGX B200" data sheet, per GPU
    "A100": 312e12,  # "NVIDIA A100 Tensor Core GPU" data sheet
    "L40S": 362e12,  # "NVIDIA L40S" data sheet
    "A10": 125e12,  # "NVIDIA A10 Tensor Core GPU" data sheet
}
_WARM_UP_STEPS = 2  # in every block, not timed
# Relative difference of first losses. No variant updates weights before them, but RefLoRA-S rescales factors, which
# changes the product B A by rounding.
_LOSS_TOLERANCE = {"cpu": 1e-5, "cuda": 2e-3}  # float32, bfloat16


def main() -> None:
    arguments = parse(Arguments)
    device = engines.start()
    results = measure(arguments, device)
    recording.publish("throughput", arguments, device, results, markdown)
    engines.finish()


def measure(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Check that the variants agree, then time them. Return the ``results`` of the record."""
    assert arguments.seq_len is not None and arguments.accumulation_steps is not None
    workload = TrainingStep(
        arguments.engine,
        arguments.shape,
        arguments.lora_rank,
        device,
        micro_batch_size=arguments.micro_batch_size,
        seq_len=arguments.seq_len,
        accumulation_steps=arguments.accumulation_steps,
        gradient_checkpointing=arguments.gradient_checkpointing,
        attn_implementation=arguments.attn_implementation,
    )
    # first, because BaLoRA balances the factors, and RefLoRA leaves balanced ones alone
    errors = variants.check_same_result(
        arguments.engine, arguments.variants, workload.trainee, lambda: run_step(workload)
    )
    losses = check_first_losses(arguments.variants, workload, _LOSS_TOLERANCE[device.type])
    with timing.progress(arguments.blocks * len(arguments.variants), "blocks of steps") as advance:
        step_ms, peak_bytes = time_blocks(arguments, workload, device, advance)
    tokens = arguments.micro_batch_size * arguments.accumulation_steps * arguments.seq_len
    flops = model_flops_per_token(arguments.shape, arguments.lora_rank, arguments.seq_len)
    peak = peak_flops(device, arguments.peak_tflops)
    return {
        "shape": dataclasses.asdict(arguments.shape),
        "tokens_per_step_per_device": tokens,
        "model_flops_per_token": flops,
        "peak_flops_per_second": peak,
        "largest_relative_error": errors,
        "first_loss": losses,
        "variants": {
            name: _figures(step_ms[name], step_ms["lora"], tokens, flops, peak, peak_bytes.get(name))
            for name in arguments.variants
        },
        "peak_resident_bytes": timing.peak_memory_bytes(device) if device.type == "cpu" else None,
    }


def check_first_losses(names: list[str], workload: TrainingStep, tolerance: float) -> dict[str, float]:
    """Return the loss of every variant on the first batch, before any update.

    Raises:
        RuntimeError: they differ by more than the relative tolerance.
    """
    losses = {}
    for name in names:
        with variants.without_updates(workload.trainee), variants.installed(name, workload.trainee):
            workload.rewind()
            run_step(workload)
        losses[name] = float(workload.last_loss)
    for name, loss in losses.items():
        if not abs(loss - losses["lora"]) <= tolerance * abs(losses["lora"]):
            raise RuntimeError(f"{name} starts from loss {loss}, lora from {losses['lora']}: they cannot be compared")
    return losses


def time_blocks(
    arguments: Arguments, workload: TrainingStep, device: torch.device, advance: Callable[[], None]
) -> tuple[dict[str, list[list[float]]], dict[str, int]]:
    """Return milliseconds per step by variant, one value per block, and on a GPU each variant's peak memory in bytes.

    A value is the mean over the steps of a block, which run without waiting for the device.
    """
    step_ms: dict[str, list[list[float]]] = {name: [] for name in arguments.variants}
    peak_bytes: dict[str, int] = {}
    for block in range(arguments.blocks):
        for name in arguments.variants if block % 2 == 0 else reversed(arguments.variants):
            with variants.installed(name, workload.trainee):
                for _ in range(_WARM_UP_STEPS):
                    run_step(workload)
                timing.reset_peak_memory(device)
                start = timing.now(device)
                for _ in range(arguments.steps):
                    run_step(workload)
                step_ms[name].append([1e3 * (timing.now(device) - start) / arguments.steps])
                if device.type == "cuda":
                    peak_bytes[name] = max(peak_bytes.get(name, 0), timing.peak_memory_bytes(device))
            advance()
    return step_ms, peak_bytes


def model_flops_per_token(shape: models.ModelShape, lora_rank: int, seq_len: int) -> float:
    """Return ``4 N + 6 N_a + 6 L h s``; see the head of this file."""
    linears = [(inputs, outputs) for _, inputs, outputs in shape.adapted_linears()]
    frozen = shape.num_layers * sum(inputs * outputs for inputs, outputs in linears)
    frozen += shape.hidden_size * shape.vocab_size  # the output layer; an embedding lookup is no arithmetic
    adapters = shape.num_layers * lora_rank * sum(inputs + outputs for inputs, outputs in linears)
    return 4 * frozen + 6 * adapters + 6 * shape.num_layers * shape.hidden_size * seq_len


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """Return the device's peak FLOP/s; None for a CPU, and for an unknown device without a given rate."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cpu":
        return None
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))  # "NVIDIA A100-SXM4-80GB"
    return next((rate for part, rate in PEAK_FLOPS.items() if words.issuperset(part.split())), None)


def _figures(
    blocks: list[list[float]],
    plain_blocks: list[list[float]],
    tokens: int,
    flops_per_token: float,
    peak: float | None,
    peak_bytes: int | None,
) -> dict[str, Any]:
    step = timing.spread(flattened(blocks))
    tokens_per_second = 1e3 * tokens / step["median"]
    # relative to lora's block of the same round: a slow phase of the machine slows both
    ratios = [plain[0] / own[0] for own, plain in zip(blocks, plain_blocks, strict=True)]
    return {
        "step_ms": step,
        "tokens_per_second_per_device": tokens_per_second,
        "mfu": None if peak is None else tokens_per_second * flops_per_token / peak,
        "throughput_ratio_by_block": timing.spread(ratios),
        "peak_allocated_bytes": peak_bytes,
    }


if __name__ == "__main__":
    main()
