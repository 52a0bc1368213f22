"""What the benchmarks share: models, engines, timing, and the record of where a figure comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reflora_dist import kernels, tall_adapters

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# those that shard store lora_A tall, as users get it; flat: as PEFT stores it; shard1: likewise, cut by columns
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3", "fsdp2-flat", "zero2-flat", "zero3-flat", "fsdp2-shard1")
BACKENDS = ("gloo", "nccl")
RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a LLaMA-class model, as in its ``config.json``."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int

    def config(self, **changes: Any) -> LlamaConfig:
        """The transformers configuration of this shape."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            use_cache=False,
            **changes,
        )

    def adapted_linears(self) -> list[tuple[str, int, int]]:
        """``(name, in_features, out_features)`` of the seven adapted linears of one layer."""
        hidden, wide = self.hidden_size, self.intermediate_size
        keys = hidden // self.num_heads * self.num_key_value_heads
        sizes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
        sizes += [(hidden, wide), (hidden, wide), (wide, hidden)]
        return [(name, *size) for name, size in zip(LINEARS, sizes, strict=True)]


def _shape(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocab: int) -> ModelShape:
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocab,
    )


SHAPES = {
    "small": _shape(512, 1376, 8, 8, 8, 4096),
    "160m": _shape(768, 3072, 12, 12, 12, 32000),  # JackFram/llama-160m
    "1b": _shape(2048, 5632, 22, 32, 4, 32000),  # TinyLlama-1.1B
    "7b": _shape(4096, 11008, 32, 32, 32, 32000),  # LLaMA-7B, Llama-2-7B
    "8b": _shape(4096, 14336, 32, 32, 8, 128256),  # Llama-3-8B
    "13b": _shape(5120, 13824, 40, 40, 40, 32000),  # Llama-2-13B
    "70b": _shape(8192, 28672, 80, 64, 8, 128256),  # Llama-3-70B
    "405b": _shape(16384, 53248, 126, 128, 8, 128256),  # Llama-3.1-405B
}


def shape_of(model: str, num_layers: int | None) -> ModelShape:
    """Of one of ``SHAPES``, with another number of layers where one is asked for."""
    return SHAPES[model] if num_layers is None else dataclasses.replace(SHAPES[model], num_layers=num_layers)


def start(backend: str | None = None) -> torch.device:
    """Join the launcher's process group, or make one of a single process, and return this rank's device.

    Args:
        backend: "gloo" lets several ranks share a GPU; by default NCCL with one GPU per rank, gloo without GPUs.

    Raises:
        ValueError: there are fewer GPUs than ranks under NCCL.
        SystemExit: the launcher set RANK but no rendezvous address.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if "MASTER_ADDR" not in os.environ:
        raise SystemExit("RANK is set but MASTER_ADDR is not: run this under torchrun, deepspeed or accelerate launch")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # ranks share the cores
        dist.init_process_group("gloo")
        return torch.device("cpu")
    backend = backend or "nccl"
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if backend == "nccl" and local_rank >= gpus:
        raise ValueError(f"{local_rank=} has no GPU of its own ({gpus} here): start fewer ranks, or use --backend gloo")
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    return device


def single_process_device(remedy: str) -> torch.device:
    """The device of a benchmark that runs in one process.

    Raises:
        ValueError: it was launched on several ranks; the message ends with ``remedy``.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ValueError(f"WORLD_SIZE={ranks}, but this benchmark runs in one process; {remedy}")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish() -> None:
    """Leave the process group; gloo's workers may abort if ranks leave at different times."""
    dist.barrier()
    dist.destroy_process_group()


def build_model(
    shape: ModelShape,
    lora_rank: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> torch.nn.Module:
    """A LLaMA from its configuration with random weights, in train mode, and LoRA on all seven linears.

    The base has ``dtype``, the factors are float32. lora_B gets random values too: PEFT's zero would be skipped.
    ``changes`` go to the configuration.
    """
    torch.manual_seed(seed)
    with device, _default_dtype(dtype):
        base = LlamaForCausalLM(shape.config(**changes))
    model = get_peft_model(base, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LINEARS))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A wrapped model: forward and backward in one call, the optimizer step in another.

    Attributes:
        model: as the engine returned it.
        optimizer: likewise; what ``reflora_dist.attach`` takes.
        backward: from a loss.
        step: the update, and clearing the gradients.
    """

    model: torch.nn.Module
    optimizer: Any
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]


def wrap(engine: str, model: torch.nn.Module, *, micro_batch_size: int = 1, learning_rate: float = 1e-4) -> Trainee:
    """Put a model under an engine, with fused AdamW over the factors, and lora_A stored as the engine's name says.

    Raises:
        ValueError: the engine is not one of ENGINES.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    if stores_tall(engine):
        tall_adapters(model)
    if engine.startswith("zero"):
        return _deepspeed(engine, model, micro_batch_size, learning_rate)
    if engine.startswith("fsdp2"):
        placement = placement_fn(engine, model)
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module, shard_placement_fn=placement)
        fully_shard(model, shard_placement_fn=placement)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    optimizer = fused_adamw(model, learning_rate)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trainee(model, optimizer, lambda loss: loss.backward(), step)


def stores_tall(engine: str) -> bool:
    """Whether lora_A is stored ``[in, r]`` under an engine."""
    return engine in ("fsdp2", "zero2", "zero3")


def placement_fn(engine: str, model: torch.nn.Module) -> Callable[[torch.nn.Parameter], Shard | None] | None:
    """What ``fully_shard`` is given as ``shard_placement_fn``: None, or columns for lora_A under "fsdp2-shard1"."""
    if engine != "fsdp2-shard1":
        return None
    by_columns = {parameter for name, parameter in model.named_parameters() if ".lora_A." in name}
    return lambda parameter: Shard(1) if parameter in by_columns else None


def _deepspeed(engine: str, model: torch.nn.Module, micro_batch_size: int, learning_rate: float) -> Trainee:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(engine[len("zero")])},
        "zero_allow_untested_optimizer": True,
    }
    if next(model.parameters()).dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    optimizer = fused_adamw(model, learning_rate)
    wrapped, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Trainee(wrapped, optimizer, wrapped.backward, wrapped.step)


def fused_adamw(model: torch.nn.Module, learning_rate: float = 1e-4) -> torch.optim.Optimizer:
    """AdamW over what is trained, as one fused kernel per group of tensors."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate, fused=True)


def now(device: torch.device) -> float:
    """Seconds, once the device and all ranks have come this far: the slowest rank is what users wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()  # NCCL's barrier is a kernel itself
    return time.perf_counter()


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[], None]]:
    """A progress bar on the first rank's terminal; yields the function that moves it on by one."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:  # only nicer with it
        Progress = None
    other_rank = dist.is_initialized() and dist.get_rank() != 0
    if Progress is None or other_rank or not sys.stderr.isatty():
        yield lambda: None
        return
    # no refreshing thread, which would run beside what is timed
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.update(task, advance=1, refresh=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, and how many values they are of."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0], "count": len(values)}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high, "count": len(values)}


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of peak memory. A process's peak resident set cannot be set back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the allocator on a GPU, of the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def provenance(device: torch.device) -> dict[str, Any]:
    """Where a figure comes from: command, commit, versions, hardware, date."""
    # the package falls back to plain torch code where its kernels do not work
    without_kernels = {"without_kernels": True} if device.type == "cuda" and not kernels.usable(device) else {}
    packages = ("torch", "transformers", "peft", "accelerate", "deepspeed", "triton", "reflora_dist")
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        **without_kernels,
    }


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the number and kind of CPU cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The repository's commit, with a plus sign if the working tree differs from it."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=folder, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("REFLORA_COMMIT")
    return f"{commit}+" if changed else commit


def publish(
    benchmark: str,
    arguments: Any,
    device: torch.device,
    results: dict[str, Any],
    markdown: Callable[[dict[str, Any]], str],
    **changes: Any,
) -> None:
    """Show a benchmark's report, and write its record to ``arguments.output`` if that is given; on the first rank.

    ``changes`` are to its provenance: a script that starts ranks of its own knows more.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    record = {
        "benchmark": benchmark,
        **provenance(device),
        **changes,
        "arguments": dataclasses.asdict(arguments),
        "results": results,
    }
    print(markdown(record))
    if arguments.output is not None:
        write_json(arguments.output, record)


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Write a result where ``report.py`` finds it; only the first rank calls this."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
