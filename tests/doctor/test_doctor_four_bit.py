"""The doctor on models whose checkpoint is quantized already; what is held is in ``test_doctor_accuracy.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from launchers.training.quantized import quantization_config
from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.doctor.diagnosis import Diagnosis
from tests.support.doctor import SMALL, found

NF4 = quantization_config(torch.bfloat16).to_dict()


def _diagnosed(folder: Path, stored: dict[str, Any] | None, config: Any = None, **options: Any) -> Diagnosis:
    config = config or LlamaConfig(**SMALL)
    if stored is not None:
        config.quantization_config = stored
    config.save_pretrained(folder)
    return diagnose([], DoctorOptions(model=str(folder), world_size=2, mixed_precision="bf16", **options))


def _sizes(diagnosis: Diagnosis) -> dict[str, int]:
    assert diagnosis.memory is not None, diagnosis.findings
    return {item.name: item.bytes for item in diagnosis.memory}


def test_a_checkpoint_in_4_bits_is_sized_as_one_that_is_packed_at_the_start(tmp_path: Path) -> None:
    asked = _diagnosed(tmp_path / "plain", None, load_in_4bit=True)
    stored = _diagnosed(tmp_path / "stored", NF4)
    plain = _diagnosed(tmp_path / "plain", None)
    assert _sizes(stored) == _sizes(asked)
    assert _sizes(stored)["base weights"] < _sizes(plain)["base weights"]
    assert stored.parameters == plain.parameters  # of the model, however it is stored
    assert not found(stored, "warning", "storage")


def test_scales_that_are_not_quantized_take_more(tmp_path: Path) -> None:
    name = "4-bit weights' scales, on every rank"
    nested = _sizes(_diagnosed(tmp_path / "nested", NF4))[name]
    flat = _sizes(_diagnosed(tmp_path / "flat", {**NF4, "bnb_4bit_use_double_quant": False}))[name]
    assert nested != flat


def test_a_storage_that_engines_would_destroy_is_named(tmp_path: Path) -> None:
    diagnosis = _diagnosed(tmp_path, {**NF4, "bnb_4bit_quant_storage": "uint8"})
    assert found(diagnosis, "warning", "bnb_4bit_quant_storage='uint8'")


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_another_quantization_is_not_sized(tmp_path: Path, load_in_4bit: bool) -> None:
    diagnosis = _diagnosed(tmp_path / "gptq", {"quant_method": "gptq", "bits": 4}, load_in_4bit=load_in_4bit)
    assert found(diagnosis, "warning", "quantized (gptq), and sized as if they were not")
    assert _sizes(diagnosis) == _sizes(_diagnosed(tmp_path / "plain", None))


def test_transposed_linear_layers_are_packed_too(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, architectures=[GPT2LMHeadModel.__name__])
    diagnosis = _diagnosed(tmp_path, None, config, load_in_4bit=True, target_modules=["c_attn"])
    layers = 2 * (3 + 1 + 4 + 4) * 64 * 64  # attention's two and the MLP's two
    others = sum((diagnosis.parameters or {}).values()) - (diagnosis.parameters or {})["factors"] - layers
    assert _sizes(diagnosis)["base weights"] == layers // 2 + 2 * others


def test_the_whole_base_has_to_fit_before_it_is_sharded(tmp_path: Path) -> None:
    whole = sum(
        _sizes(_diagnosed(tmp_path, NF4))[name] for name in ("base weights", "4-bit weights' scales, on every rank")
    )
    message = "every rank loads the whole 4-bit base"
    assert found(_diagnosed(tmp_path, NF4, gpu_memory_gib=0.99 * whole / 2**30), "error", message)
    assert not found(_diagnosed(tmp_path, NF4, gpu_memory_gib=1.01 * whole / 2**30), "error", message)
