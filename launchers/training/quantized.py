"""A base of 4-bit weights, as QLoRA trains on it (Dettmers et al., 2023, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization.

    The packed weights are stored as elements of the dtype in which the model computes: FSDP shards no integers, and
    what casts parameters to that dtype (DeepSpeed's bf16, FSDP's mixed precision) would destroy any other storage.

    Args:
        dtype: in which the model computes.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def keep_weight_layout(model: Any) -> None:
    """Have bitsandbytes leave weights as they are in evaluations on a CPU with AVX512-BF16.

    It would bring them into a layout for inference, from which a later training step gets no gradient of the layer's
    input: all layers before would train on wrong ones, in silence.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
