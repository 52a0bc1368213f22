"""Configurations that the doctor is given, and what it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.launchers import REPOSITORY

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "architectures": ["LlamaForCausalLM"],
}
ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}
WRAPPED = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
FSDP2 = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": WRAPPED}
FSDP1 = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_version": 1}}


def zero3(top: dict[str, Any] | None = None, **zero: Any) -> dict[str, Any]:
    """ZERO3 with other top-level keys, and other keys of the ZeRO section; None removes one."""
    config = {**ZERO3, **(top or {}), "zero_optimization": {"stage": 3, **zero}}
    return {key: value for key, value in config.items() if value is not None}


def written(folder: Path, content: dict[str, Any], name: str = "config") -> str:
    """The path of a file: YAML for accelerate, else JSON."""
    is_yaml = "distributed_type" in content
    path = folder / (f"{name}.yaml" if is_yaml else f"{name}.json")
    path.write_text(yaml.safe_dump(content) if is_yaml else json.dumps(content))
    return str(path)


def found(diagnosis: Any, level: str, message: str) -> bool:
    return any(finding.level == level and message in finding.message for finding in diagnosis.findings)


SHIPPED = sorted([*(REPOSITORY / "ds_configs").glob("*.json"), *(REPOSITORY / "launchers/accelerate").glob("*.yaml")])
