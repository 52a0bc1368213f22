"""Engines: join the ranks, and wrap a model and its optimizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.harness.names import ENGINES
from reflora_dist import tall_adapters


def start(backend: str | None = None) -> torch.device:
    """Join the launcher's process group, or make one of a single process. Return this rank's device.

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
    """Return the device of a benchmark that runs in one process.

    Raises:
        ValueError: the benchmark was launched on several ranks; the message ends with ``remedy``.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ValueError(f"WORLD_SIZE={ranks}, but this benchmark runs in one process; {remedy}")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish() -> None:
    """Leave the process group together, because gloo's workers may abort if ranks leave at different times."""
    dist.barrier()
    dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Trainee:
    """A wrapped model with its optimizer, and the calls that train it.

    Attributes:
        model: the model as the engine returned it.
        optimizer: the optimizer as the engine returned it, for ``reflora_dist.attach``.
        backward: runs the backward pass of a loss.
        step: updates the weights and clears the gradients.
    """

    model: torch.nn.Module
    optimizer: Any
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]


def wrap(engine: str, model: torch.nn.Module, *, micro_batch_size: int = 1, learning_rate: float = 1e-4) -> Trainee:
    """Wrap a model in an engine, with fused AdamW over the factors. The engine's name decides how lora_A is stored.

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
    """Return whether lora_A is stored ``[in, r]`` under an engine."""
    return engine in ("fsdp2", "zero2", "zero3")


def placement_fn(engine: str, model: torch.nn.Module) -> Callable[[torch.nn.Parameter], Shard | None] | None:
    """Return ``shard_placement_fn`` for ``fully_shard``: None, or columns for lora_A under "fsdp2-shard1"."""
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
    """Return AdamW over the trained parameters, with one fused kernel per group of tensors."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate, fused=True)
