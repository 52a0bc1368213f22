"""A base in 4 bits, as in QLoRA (Dettmers et al., 2023, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig


def quantization_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return NF4 with double quantization.

    Packed weights are stored as elements of the dtype in which the model computes. FSDP does not shard integers, and
    DeepSpeed's bf16 and FSDP's mixed precision would destroy any other storage by a cast to that dtype.

    Args:
        dtype: the dtype in which the model computes.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def keep_weight_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking weights in evaluations on a CPU with AVX512-BF16.

    The other layout is for inference. A later training step gets no gradient of the layer's input from it, and all
    layers before would train on wrong gradients without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
