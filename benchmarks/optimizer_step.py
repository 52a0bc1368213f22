"""What RefLoRA adds to the optimizer step and to the whole training step, beside plain LoRA in the same run.

Run under a launcher, for example two ranks on one machine:

    torchrun --nproc-per-node 2 benchmarks/optimizer_step.py --engine zero3

One model is trained; blocks of steps with the method attached alternate with blocks without, so both see the same
machine, memory and weights. Prints medians, their spread and the ratios, and writes them as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import reflora_dist
from reflora_dist import RefLoRAConfig, attach

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


@dataclasses.dataclass
class Arguments:
    """Sizes of the model and of the measurement."""

    engine: str = dataclasses.field(default="zero3", metadata={"help": "one of ddp, fsdp2, zero2, zero3"})
    method: str = dataclasses.field(default="reflora", metadata={"help": "reflora or reflora-s"})
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_layers: int = 8
    vocab_size: int = 4096
    lora_rank: int = 16
    batch_size: int = dataclasses.field(default=4, metadata={"help": "sequences per rank"})
    seq_len: int = 128
    blocks: int = dataclasses.field(default=6, metadata={"help": "blocks of steps with and without the method"})
    steps: int = dataclasses.field(default=8, metadata={"help": "measured steps per block"})
    seed: int = 0
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"--engine {self.engine} is unknown; choose one of {', '.join(ENGINES)}")


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A wrapped model: forward and backward in one call, the optimizer step in another."""

    model: torch.nn.Module
    optimizer: Any
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    device = _start()
    trainee = build(arguments, device)
    times, report = measure(arguments, trainee, device)
    if dist.get_rank() == 0:
        result = {
            "command": " ".join(["benchmarks/optimizer_step.py", *sys.argv[1:]]),
            "arguments": dataclasses.asdict(arguments),
            "hardware": _hardware(device),
            "versions": {"torch": torch.__version__, "reflora_dist": reflora_dist.__version__},
            "report": report,
            **summary(times),
        }
        print(table(arguments, result))
        if arguments.output is not None:
            Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def _start() -> torch.device:
    if "RANK" not in os.environ:
        raise SystemExit("run this under a launcher: torchrun --nproc-per-node 2 benchmarks/optimizer_step.py")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)  # ranks share the cores
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def build(arguments: Arguments, device: torch.device) -> Trainee:
    """A LLaMA from its config with random weights and LoRA on all seven linears, under the engine asked for."""
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=max(1, arguments.hidden_size // 64),
        vocab_size=arguments.vocab_size,
        use_cache=False,
    )
    lora = LoraConfig(r=arguments.lora_rank, target_modules=LINEARS)
    model = get_peft_model(LlamaForCausalLM(config), lora).to(device)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT's zero would be skipped
            torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    if arguments.engine.startswith("zero"):
        return _deepspeed(arguments, model)
    if arguments.engine == "fsdp2":
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = _fused_adamw(model)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(model, optimizer, lambda loss: loss.backward(), step)


def _deepspeed(arguments: Arguments, model: torch.nn.Module) -> Trainee:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": arguments.batch_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(arguments.engine[-1])},
        "zero_allow_untested_optimizer": True,
    }
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=_fused_adamw(model), config=config)
    return Trainee(engine, optimizer, engine.backward, engine.step)


def _fused_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)


Times = dict[str, dict[str, list[float]]]


def measure(arguments: Arguments, trainee: Trainee, device: torch.device) -> tuple[Times, dict[str, Any]]:
    """Alternate blocks with the method and without. Returns milliseconds per step and the handle's report."""
    times: Times = {name: {"optimizer_step_ms": [], "training_step_ms": []} for name in ("lora", arguments.method)}
    config = RefLoRAConfig(method=arguments.method, warmup_steps=0)
    report: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(arguments.seed + dist.get_rank())
    for block in range(2 * arguments.blocks):
        name = ("lora", arguments.method)[block % 2]
        handle = attach(trainee.model, trainee.optimizer, config) if name != "lora" else None
        for step in range(arguments.steps + 1):
            shape = (arguments.batch_size, arguments.seq_len)
            batch = torch.randint(arguments.vocab_size, shape, generator=generator).to(device)
            elapsed = _timed_step(trainee, batch, device)
            if step > 0:  # the first step of a block warms up
                for key, value in elapsed.items():
                    times[name][key].append(value)
        if handle is not None:
            report = handle.report().as_dict()
            assert report["applied_steps"] == report["steps"] and not report["skipped_pairs"], report
            handle.detach()
    return times, report


def _timed_step(trainee: Trainee, batch: torch.Tensor, device: torch.device) -> dict[str, float]:
    start = _now(device)
    trainee.backward(trainee.model(input_ids=batch, labels=batch).loss)
    middle = _now(device)
    trainee.step()
    end = _now(device)
    return {"optimizer_step_ms": 1e3 * (end - middle), "training_step_ms": 1e3 * (end - start)}


def _now(device: torch.device) -> float:
    """Seconds, once the device and all ranks have come this far: the slowest rank is what users wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def summary(times: Times) -> dict[str, Any]:
    """Median and interquartile range per variant, and the ratios of the medians."""
    (plain, plain_times), (method, method_times) = times.items()
    statistics_by_variant = {
        name: {key: _spread(values) for key, values in variant.items()} for name, variant in times.items()
    }
    ratios = {key: statistics.median(method_times[key]) / statistics.median(plain_times[key]) for key in plain_times}
    return {"variants": statistics_by_variant, "ratio": ratios, "compared": [method, plain]}


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "q1": low, "q3": high, "count": len(values)}


def table(arguments: Arguments, result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    size = f"hidden {arguments.hidden_size}, {arguments.num_layers} layers, r={arguments.lora_rank}"
    lines = [
        f"{arguments.engine}, {dist.get_world_size()} ranks, {size}, {result['hardware']}",
        "",
        "| | optimizer step, ms (quartiles) | training step, ms (quartiles) |",
        "|---|---|---|",
    ]
    for name, variant in result["variants"].items():
        cells = [f"{v['median']:.2f} ({v['q1']:.2f} to {v['q3']:.2f})" for v in variant.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios = " | ".join(f"{value:.3f} x" for value in result["ratio"].values())
    report = result["report"]
    sent = f"{report['bytes_per_step']:,} bytes per rank and step, {report['collectives_per_step']}"
    return "\n".join([*lines, f"| ratio | {ratios} |", "", f"sent: {sent}"])


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


if __name__ == "__main__":
    main()
