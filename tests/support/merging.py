"""Bases and adapters of every kind that can be merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from reflora_dist.lora_sb import LoraXSConfig

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
_GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **_LORA}
# name: base, tied embeddings, adapter
MERGE_CASES: dict[str, tuple[str, bool, Any]] = {
    "linear": ("llama", False, LoraConfig(target_modules="all-linear", **_LORA)),
    "patterns-rslora": (
        "llama",
        False,
        LoraConfig(
            target_modules="all-linear",
            use_rslora=True,
            rank_pattern={"layers.1.self_attn.q_proj": 7, "k_proj": 2},
            alpha_pattern={"down_proj": 3},
            **_LORA,
        ),
    ),
    "dora": ("llama", True, LoraConfig(target_modules="all-linear", use_dora=True, **_LORA)),
    "embedding": ("llama", False, LoraConfig(target_modules=["embed_tokens", "q_proj"], **_LORA)),
    "head-beside-tied-embedding": (
        "llama",
        True,
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm"], **_LORA),
    ),
    "tied-embedding-saved": (
        "llama",
        True,
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, **_LORA),
    ),
    "conv1d": ("gpt2", True, LoraConfig(**_GPT2)),
    "conv1d-dora": ("gpt2", True, LoraConfig(use_dora=True, **_GPT2)),
    "trained-biases": ("gpt2", True, LoraConfig(bias="all", **_GPT2)),
    "bias-of-lora": ("gpt2", True, LoraConfig(lora_bias=True, **_GPT2)),
    "lora-xs": ("llama", False, LoraXSConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")),
}


def save_base(kind: str, tied: bool, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> type:
    """A random model in several files."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**{**_LLAMA, "tie_word_embeddings": tied, **more}))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32))
    model.to(dtype).save_pretrained(folder, max_shard_size="8KB")
    return type(model)


def save_adapter(base: Any, config: Any, folder: Path) -> None:
    """All that the adapter trains is random, so that nothing is zero or one."""
    model = get_peft_model(base, copy.deepcopy(config))  # PEFT writes the modules that it found into it
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
