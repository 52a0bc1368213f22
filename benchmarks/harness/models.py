"""Shapes of LLaMA-class models, and PEFT models of these shapes.

Functions import the libraries, since ``--help`` prints the shapes' names without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
        """Return the transformers configuration of this shape."""
        from transformers import LlamaConfig

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
        """Return ``(name, in_features, out_features)`` of the seven adapted linears of one layer."""
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
    "smollm2": _shape(576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
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
    """Return one of ``SHAPES``, with another number of layers if one is given."""
    return SHAPES[model] if num_layers is None else dataclasses.replace(SHAPES[model], num_layers=num_layers)


def build_model(
    shape: ModelShape,
    lora_rank: int,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **changes: Any,
) -> torch.nn.Module:
    """Build a LLaMA with random weights, in train mode, and LoRA on all seven linears.

    The base has ``dtype``, by default float32, and the factors are float32. lora_B gets random values too, because
    pairs with PEFT's B = 0 would be skipped. ``changes`` go to the configuration.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    with device, _default_dtype(dtype or torch.float32):
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
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
