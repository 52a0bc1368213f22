"""Configurations that would fail at the start are refused by the doctor, with a finding instead of a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.doctor.activations import activation_bytes
from reflora_dist.doctor.setup import Setup
from tests.test_doctor import FSDP1, FSDP2, SMALL, ZERO3, found, written, zero3


def fsdp(version: int, **section: Any) -> dict[str, Any]:
    """An accelerate configuration with these keys in ``fsdp_config``."""
    return {**(FSDP1 if version == 1 else FSDP2), "fsdp_config": {"fsdp_version": version, **section}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (fsdp(2, fsdp_reshard_after_forward="FULL_SHARD"), "invalid truth value full_shard"),
    (fsdp(3), "fsdp_version: 3 is unknown"),
    (fsdp(2, fsdp_auto_wrap_policy="NOSUCH"), "Invalid auto wrap policy: NOSUCH"),
    (fsdp(1, fsdp_sharding_strategy="FULLSHARD"), "KeyError: 'FULLSHARD'"),
    ({**FSDP2, "mixed_precision": "bf17"}, "mixed_precision: bf17 is not supported"),
    ({**FSDP2, "mixed_precision": False}, "mixed_precision: false is not supported"),
    ({**FSDP2, "fsdp_config": True}, "fsdp_config: True is not a section"),
    ({**FSDP2, "fsdp_config": [1]}, "fsdp_config: [1] is not a section"),
    ({**FSDP2, "fsdp_config": {1: 2}}, "fsdp_config: the key 1 is not a string"),
    ({**FSDP2, "num_machines": "two"}, "num_machines: 'two' is no whole number"),
    ({**FSDP2, "num_processes": "two"}, "num_processes: 'two' is no whole number"),
    ({**FSDP2, "num_processes": 0}, "num_processes: 0 is no whole number above 0"),
    ({**FSDP2, "num_machines": 3, "num_processes": 8}, "8 ranks on 3 machines"),
    (zero3({"fp16": True}), "fp16: True is not a section"),
    (zero3({"optimizer": "AdamW"}), "optimizer: 'AdamW' is not a section"),
    ({**ZERO3, "zero_optimization": True}, "zero_optimization: True is not a section"),
    (zero3({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}), "betas: 0.9 is no list of two numbers"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    diagnosis = diagnose([written(tmp_path, config)], DoctorOptions())
    assert found(diagnosis, "error", message), diagnosis.findings
    assert not any(str(tmp_path) in finding.message for finding in diagnosis.findings), "the path is told beside it"


MODELS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"attn_implementation": "flash_attention_2"}, "no adapter can be put into it: ImportError"),
    ({"num_attention_heads": 0}, {}, "ZeroDivisionError"),
    ({"hidden_size": "wide"}, {}, "cannot be read"),
    ({"model_type": "deberta-v2"}, {}, "DebertaV2Config is no causal language model's"),
]


@pytest.mark.parametrize(("changed", "options", "message"), MODELS, ids=[message for *_, message in MODELS])
def test_models_that_cannot_be_sized(
    changed: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One line, whatever a library says."""
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "llama", **changed}))
    diagnosis = diagnose([], DoctorOptions(model=str(tmp_path), **options))
    assert found(diagnosis, "error", message), diagnosis.findings
    assert all("\n" not in finding.message for finding in diagnosis.findings)
    assert not any("--model" in finding.message for finding in diagnosis.findings)


def test_one_layer_with_a_list_of_layer_types() -> None:
    config = Qwen2Config(**{**SMALL, "num_hidden_layers": 1})
    assert len(config.layer_types) == 1
    assert activation_bytes(config, DoctorOptions(sequence_length=16), Setup(engine="single", world_size=1)) > 0
