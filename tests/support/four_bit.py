"""The workload's model on a base of 4-bit weights, by bitsandbytes' CPU backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from launchers.training.quantized import keep_weight_layout, quantization_config
from tests.support.workloads import Workload, load_factors


def save_base(workload: Workload, folder: Path) -> None:
    base = LlamaForCausalLM(LlamaConfig(**workload.llama))
    base.load_state_dict(workload.base_weights)
    base.save_pretrained(folder)


def quantized_base(folder: Path) -> Any:
    """As finetune.py loads it with ``--load_in_4bit``."""
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization_config(torch.float32),
        attn_implementation="eager",
        device_map={"": "cpu"},  # where there is a GPU transformers would take it
    )
    keep_weight_layout(base)
    return base


def quantized_model(workload: Workload, folder: Path) -> PeftModel:
    """The workload's model, its base in 4 bits."""
    model = get_peft_model(quantized_base(folder), LoraConfig(**workload.lora))
    load_factors(model, workload.initial_factors)
    model.train()
    return model
