"""Adapters of further kinds under every engine: DoRA, trained modules, embeddings, biases, two adapters."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from reflora_dist import tall_adapters
from tests.support.engines_under_test.common import Wrapped, optimizer_of
from tests.support.engines_under_test.zero import Zero, zero_config
from tests.support.workloads import synthetic_workload

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "modules-to-save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "bias": {"target_modules": ["q_proj", "gate_proj"], "bias": "lora_only"},
}


def variant_base() -> LlamaForCausalLM:
    workload = synthetic_workload(steps=1)
    base = LlamaForCausalLM(LlamaConfig(**workload.llama))
    base.load_state_dict(workload.base_weights)
    return base


def variant_model(variant: str) -> PeftModel:
    torch.manual_seed(0)
    lora = {**synthetic_workload(steps=1).lora, **VARIANTS.get(variant, {})}
    model = get_peft_model(variant_base(), LoraConfig(**lora))
    if variant == "two-adapters":
        model.add_adapter("other", LoraConfig(**{**lora, "r": 4}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def wrap_variant(engine_name: str, model: PeftModel, world_size: int) -> Wrapped:
    """As the engine under test, which asserts that nothing but factors is trained."""
    workload = synthetic_workload(steps=1)
    settings = workload.settings
    model.train()
    engine_name, _, tall = engine_name.partition("+")
    if tall:
        assert tall_adapters(model)
    if engine_name == "ddp":
        ddp = DistributedDataParallel(model)
        return Wrapped(ddp, optimizer_of(ddp, settings), settings)
    if engine_name == "fsdp2":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        return Wrapped(model, optimizer_of(model, settings), settings)
    if engine_name.startswith("fsdp1"):
        flat = engine_name == "fsdp1-flat"
        policy = fsdp_auto_wrap_policy(model) if flat else ModuleWrapPolicy({LlamaDecoderLayer})
        options: dict[str, Any] = {"use_orig_params": not flat, "device_id": torch.device("cpu")}
        fsdp1 = FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
        return Wrapped(fsdp1, optimizer_of(fsdp1, settings), settings)
    stage = int(engine_name[4])
    more = {"stage3_param_persistence_threshold": 0} if engine_name.endswith("persist-none") else {}
    config = zero_config(settings, workload.batches.shape[1] // world_size, stage, **more)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer_of(model, settings), config=config)
    return Zero(engine, optimizer, settings)
