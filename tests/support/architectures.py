"""Language models of other architectures than LLaMA, each of some ten thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.support.launchers import fast_tokenizer

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_USUAL = {**_SIZES, "intermediate_size": 64}
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_GROUPED, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 8},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": ("GptOssConfig", {**_GROUPED, "head_dim": 8, "num_local_experts": 4}),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "phi": ("PhiConfig", _USUAL),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", _SIZES),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "mamba": ("MambaConfig", _MAMBA),
    "falcon_h1": (
        "FalconH1Config",
        {**_GROUPED, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
    "lfm2": ("Lfm2Config", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("RecurrentGemmaConfig", {**_GROUPED, "lru_width": 32, "num_hidden_layers": 3}),
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
}


def small_architecture(name: str, std: float | None = None, **changes: Any) -> Any:
    """A model with random weights, ready for evaluation.

    Args:
        name: one of ``CONFIGS``.
        std: of the weights, which then do not start as PyTorch's or transformers' do.
        changes: of the configuration.
    """
    kind, settings = CONFIGS[name]
    tokens = {"vocab_size": 360, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, kind)(**{**tokens, **settings, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if std is not None:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def saved_architecture(name: str, folder: Path, std: float | None = None, **changes: Any) -> Path:
    """The model and the byte-level tokenizer of ``tests.support.launchers`` in a folder."""
    fast_tokenizer(folder)
    small_architecture(name, std, **changes).save_pretrained(folder)
    return folder
