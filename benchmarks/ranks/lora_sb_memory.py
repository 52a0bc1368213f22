"""One rank of ``benchmarks/lora_sb_memory.py``: run one variant and record its time and memory.

That script starts it through ``torch.distributed.run``, with the paths of the job and of the result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.harness import engines, models, recording, timing
from reflora_dist.lora_sb import LoRASBConfig, LoraXSConfig, LoraXSLinear, initialize_lora_sb

LEARNING_RATE = 1e-4


def main() -> None:
    job_file, result_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    device = engines.start()
    torch.manual_seed(0)
    with device:
        base = LlamaForCausalLM(models.SHAPES[job["shape"]].config())
    base.train().requires_grad_(False)
    batches = _batches(job, device)
    before = _reset_peak(device)
    start = timing.now(device)
    energy = _all_at_once(base, batches, job) if job["variant"] == "all at once" else _adapted(base, batches, job)
    seconds = timing.now(device) - start
    peak = torch.tensor([_peak(device), _peak(device) - before], device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        figures = {"peak_bytes": int(peak[0]), "added_bytes": int(peak[1])}
        recording.write_json(result_file, {"seconds": seconds, **figures, "energy": energy})
    engines.finish()


def _reset_peak(device: torch.device) -> int:
    """Reset the peak after the model was built. Return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM to the resident set
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _batches(job: dict[str, Any], device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    vocabulary = models.SHAPES[job["shape"]].vocab_size
    size = (job["batches"], job["batch_size"], job["seq_len"])
    tokens = torch.randint(vocabulary, size, generator=generator).to(device)
    return [{"input_ids": batch, "labels": batch} for batch in tokens]


def _adapted(base: nn.Module, batches: list[dict[str, Tensor]], job: dict[str, Any]) -> float | None:
    """Initialize adapters that every rank holds whole, or only train. Return the energy of ``B R A``, or None."""
    config = LoraXSConfig(r=job["lora_rank"], target_modules=models.LINEARS)
    # not wrapped, because DDP's own copies of the weights would be the peak
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    optimizer = engines.fused_adamw(model)
    if job["variant"] == "training":
        model(**batches[0]).loss.backward()
        return None
    settings = LoRASBConfig(num_batches=len(batches), learning_rate=LEARNING_RATE)
    initialize_lora_sb(model, optimizer, batches, settings)
    layers = [module for module in model.modules() if isinstance(module, LoraXSLinear)]
    return sum(layer.factors("default")[1].square().sum().item() for layer in layers)


def _all_at_once(base: nn.Module, batches: list[dict[str, Tensor]], job: dict[str, Any]) -> float:
    """Hold the gradients of all adapted weights on every rank, as published but without copies. Return the energy."""
    weights = [module.weight for name, module in base.named_modules() if name.endswith(tuple(models.LINEARS))]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        base(**batch).loss.backward()
    energy = 0.0
    for weight in weights:
        dist.all_reduce(weight.grad)
    for weight in weights:
        step = weight.grad.sign_().mul_(-LEARNING_RATE)
        # oversampled, and with as many iterations as published
        values = torch.svd_lowrank(step, q=2 * job["lora_rank"], niter=10)[1]
        energy += values[: job["lora_rank"]].square().sum().item()
    return energy


if __name__ == "__main__":
    main()
