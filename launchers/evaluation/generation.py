"""Load a base model with an adapter, and generate answers to a batch of prompts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, GenerationConfig

from reflora_dist import lora_sb  # noqa: F401  (adapters that PEFT does not know by itself)
from reflora_dist.checkpoints.adapter_files import require_tensors
from reflora_dist.checkpoints.embeddings import resize_for
from reflora_dist.checkpoints.merged_record import refuse_merged_twice
from reflora_dist.engines.bare_base import require_adapter, require_no_adapter
from reflora_dist.files.base_files import load_base, require_no_missing
from reflora_dist.files.open_files import cause_of, read_peft_config, read_peft_weights
from reflora_dist.files.other_files import tokenizer_files

from ..data.conversations import end_of_turn
from ..data.tokenization import CHAT, padding_token

MODEL_FILES = ("*.safetensors", "*.bin", "*.index.json", "config.json", "adapter_config.json", "*.jinja")


def base_of(adapter: str) -> str:
    """Return the base model that an adapter's configuration names.

    Raises:
        ValueError: the folder holds no adapter, or its configuration names no base or another adapter as the base.
    """
    require_adapter(adapter)
    base = read_peft_config(adapter).base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ValueError(f"adapter={adapter!r} names no base model; give --model")
    require_no_adapter(base, f"{adapter} was trained on it; merge that one into its base first (export.py --merge)")
    return base


def own_device(local_rank: int = 0) -> torch.device:
    """Return this rank's accelerator, and make it the current one; the CPU without accelerators."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)  # PEFT loads an adapter onto the current device
    return torch.device(accelerator.type, local_rank)


def tokenizer_of(base: str, adapter: str | None) -> str:
    """Return the name of the tokenizer that an adapter was trained with: its own, if its folder holds one.

    Tokens may have been added to it. Otherwise the base's tokenizer was used.
    """
    if adapter is not None and Path(adapter).is_dir() and tokenizer_files(Path(adapter)):
        return adapter
    return base


def load_model(base: str, adapter: str | None, dtype: torch.dtype | str, device: torch.device, config: Any) -> Any:
    """Load the base on this rank's device and the adapter beside it. Merging into bf16 weights would round it away.

    Args:
        base: hub name or local path.
        adapter: folder or hub name of a PEFT adapter, or None.
        dtype: dtype of the base, "auto" for that of its files; the adapter stays in float32.
        device: this rank's device.
        config: ``GenerationConfig`` that replaces the model's own, which may sample.

    Raises:
        ValueError: the base or the adapter cannot be loaded.
    """
    if adapter is not None:
        require_adapter(adapter)
    model, missing = load_base(AutoModelForCausalLM, base, dtype=dtype, device_map={"": device})
    require_no_missing(base, missing)
    stops = _ids(model.generation_config.eos_token_id)
    if not all(stop is None or isinstance(stop, int) for stop in stops):
        raise ValueError(f"model {base!r} has eos_token_id={stops!r}: correct generation_config.json or config.json")
    config.eos_token_id = sorted({*_ids(config.eos_token_id), *stops} - {None}) or None
    model.generation_config = config
    if adapter is None:
        return model.eval()
    try:
        tensors = read_peft_weights(adapter)
        refuse_merged_twice(base, adapter)
        resize_for(model, tensors, adapter)
        peft_model = PeftModel.from_pretrained(model, adapter).eval()
    except Exception as error:  # PEFT, safetensors and the hub's client raise many kinds
        raise ValueError(f"adapter {adapter!r} does not load on {base!r}: {cause_of(error)}") from error
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
    embeddings = {key for key in tensors if ".lora_" not in key}  # PEFT keeps them if they were resized
    require_tensors(Path(adapter), tensors, wanted, wanted | embeddings)
    return peft_model


def _ids(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def generation_config(tokenizer: Any, num_beams: int = 1, template: str = "plain") -> GenerationConfig:
    """Return a configuration without sampling: greedy decoding, or a beam search.

    Args:
        tokenizer: its end token ends an answer, and with the chat template also the template's end of turn.
        num_beams: 1 for greedy decoding.
        template: the prompt template.

    Raises:
        ValueError: the template is the tokenizer's, and it has none or cannot be used.
    """
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer) if template == CHAT else None} - {None}
    return GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        pad_token_id=padding_token(tokenizer),
        eos_token_id=sorted(ends) or None,
    )


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Return the model's answer to each prompt.

    Prompts are padded on the left and the padding is masked. So in exact arithmetic the answers of most models do not
    depend on the rest of the batch; ``batching.require_same_in_batch`` checks that. In bf16 rounding may decide a near
    tie between two tokens either way.
    """
    inputs = left_padded(model, prompts)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(generated, skip_special_tokens=True)]


def left_padded(model: Any, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of a batch of prompts, which all end in its last column."""
    length = max(map(len, prompts))
    padding = model.generation_config.pad_token_id
    input_ids = torch.tensor([[padding] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}


def fingerprint(name: str) -> str:
    """Return a digest of the names, sizes and times of a local folder's files; a hub name is returned as it is."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)})
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
