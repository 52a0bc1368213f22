"""An adapter with no tensors, half of them, others, NaN or another shape is refused by name, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launchers.evaluation.generation import generation_config, load_model
from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoints.training_state import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from reflora_dist.export.consolidate import consolidate_adapter
from tests.support.launchers import micro_model
from tests.support.small import small_batches, small_model, train_small, trainable

Tensors = dict[str, Tensor]


def _with_nan(tensors: Tensors) -> Tensors:
    name = sorted(tensors)[0]
    return {**tensors, name: torch.full_like(tensors[name], torch.nan)}


def _reshaped(tensors: Tensors) -> Tensors:
    name = next(name for name in sorted(tensors) if "lora_A" in name)
    return {**tensors, name: tensors[name].t().contiguous()}


_DAMAGE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no tensors": (lambda tensors: {}, r"lacks \d+ of the model's parameters"),
    "half of them": (lambda tensors: dict(sorted(tensors.items())[::2]), r"lacks \d+ of the model's parameters"),
    "one more": (lambda tensors: {**tensors, "base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, "no place for"),
    "NaN": (_with_nan, "not finite"),
    "transposed": (_reshaped, r"in the shape .* the model's is|does not load"),
}


@pytest.mark.parametrize("damage", _DAMAGE)
@pytest.mark.parametrize("tall", [False, True])
def test_load_adapter_refuses_it_and_changes_nothing(damage: str, tall: bool, tmp_path: Path) -> None:
    from reflora_dist import tall_adapters

    change, message = _DAMAGE[damage]
    save_adapter(small_model(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    model = small_model(seed=3)
    if tall:
        tall_adapters(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    before = [parameter.detach().clone() for parameter in trainable(model)]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, optimizer, tmp_path)
    assert all(map(torch.equal, before, trainable(model)))


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{", b"not safetensors"])
def test_a_file_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    model = small_model()
    save_adapter(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        load_adapter(model, torch.optim.AdamW(trainable(model)), tmp_path)


@pytest.mark.parametrize("damage", _DAMAGE)
def test_evaluation_refuses_it(damage: str, tmp_path: Path) -> None:
    """As `evaluate.py` and `ask.py` load it; the adapter as it was loads."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    change, message = _DAMAGE[damage]
    micro_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    arguments = (str(tmp_path / "base"), str(tmp_path / "adapter"), "auto", torch.device("cpu"))
    load_model(*arguments, generation_config(tokenizer))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        load_model(*arguments, generation_config(tokenizer))


def test_what_is_not_finite_is_not_continued_or_exported(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    handle = attach(model, optimizer, RefLoRAConfig(warmup_steps=0))
    train_small(model, optimizer, small_batches(1))
    with torch.no_grad():
        trainable(model)[0].fill_(torch.nan)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, handle)
    with pytest.raises(ValueError, match="not finite: export an earlier checkpoint"):
        consolidate_adapter(tmp_path / "checkpoint", tmp_path / "out")
    model = small_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    state = load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    with pytest.raises(ValueError, match="is not finite in what was loaded: continue from an earlier checkpoint"):
        attach(model, optimizer, RefLoRAConfig(warmup_steps=0), state_dict=state)
    with torch.no_grad():
        trainable(model)[0].fill_(0.1)
    attach(model, optimizer, RefLoRAConfig(warmup_steps=0), state_dict=state)  # the refusal has left nothing behind
