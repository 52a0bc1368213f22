"""LoRA-XS adapters on the tiny LLaMA: the model, its batches, and what autograd and torch.linalg make of them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist.lora_sb import LoRASBConfig, LoraXSConfig
from tests.support.workloads import LINEARS, Workload

R = 4
LEARNING_RATE = 1e-3
BATCHES = 2  # global batches that the gradient is estimated from
CONFIG = LoRASBConfig(num_batches=BATCHES, learning_rate=LEARNING_RATE)


def base_model(workload: Workload, gradient_checkpointing: bool = False) -> LlamaForCausalLM:
    """The pretrained model."""
    base = LlamaForCausalLM(LlamaConfig(**workload.llama))
    base.load_state_dict(workload.base_weights)
    base.config.use_cache = False
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return base


def xs_model(
    workload: Workload, *, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False, **config: Any
) -> PeftModel:
    """The adapters before they are initialized; equal on all ranks."""
    settings: dict[str, Any] = {"r": R, "target_modules": list(LINEARS), **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base_model(workload, gradient_checkpointing), LoraXSConfig(**settings))
    model.train()
    return model.to(dtype)


def local_batches(workload: Workload, rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """A rank's part of the batches that the gradient is estimated from."""
    parts = [batch.chunk(world_size)[rank] for batch in workload.batches[:BATCHES]]
    return [{"input_ids": part, "labels": part} for part in parts]


def full_gradients(workload: Workload) -> dict[str, Tensor]:
    """The mean gradient of every adapted weight by autograd, by the module's name in the base model."""
    base = base_model(workload)
    for batch in workload.batches[:BATCHES]:
        (base(input_ids=batch, labels=batch).loss / BATCHES).backward()
    modules = dict(base.named_modules())
    weights = {name: module.weight for name, module in modules.items() if name.endswith(LINEARS)}
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
