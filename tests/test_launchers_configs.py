"""Every shipped configuration is read by the library that it is for, without unknown keys."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from tests.test_launchers_support import REPOSITORY

DEEPSPEED = sorted((REPOSITORY / "ds_configs").glob("*.json"))
ACCELERATE = sorted((REPOSITORY / "launchers" / "accelerate").glob("*.yaml"))
SCRIPTS = sorted((REPOSITORY / "launchers").glob("*.sh"))
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
# What transformers puts in for "auto"; any legal values will do here.
AUTO = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.5,
    "enabled": False,
    "reduce_bucket_size": 1024,
    "stage3_prefetch_bucket_size": 1024,
    "stage3_param_persistence_threshold": 320,
    "lr": 1e-3,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.0,
}


def _filled(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, key) for key, inner in value.items()}
    return AUTO[name] if value == "auto" else value


def test_all_configurations_are_there() -> None:
    assert [path.stem for path in DEEPSPEED] == sorted(STAGES)
    assert [path.stem for path in ACCELERATE] == ["deepspeed_zero3", "fsdp1", "fsdp2"]


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_reads_it(path: Path, precision: str) -> None:
    config = _filled(json.loads(path.read_text()))
    if precision != "fp32":
        config[precision]["enabled"] = True
    loaded = DeepSpeedConfig(config)
    assert loaded.zero_optimization_stage == STAGES[path.stem]
    assert loaded.gradient_clipping == 0.5
    assert loaded.bfloat16_config.enabled == (precision == "bf16")
    assert loaded.float16_config.enabled == (precision == "fp16")


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_knows_every_key(path: Path) -> None:
    config = json.loads(path.read_text())
    zero = config["zero_optimization"]
    known = {name for n, f in DeepSpeedZeroConfig.model_fields.items() for name in (n, f.alias) if name}
    assert set(zero) <= known, set(zero) - known
    deprecated = {
        name
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if (field.json_schema_extra or {}).get("deprecated")  # type: ignore[union-attr]
    }
    assert not set(zero) & deprecated
    assert set(config) - {"zero_optimization", "optimizer"} == {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
    }


def test_every_key_that_json_cannot_comment_is_explained() -> None:
    readme = (REPOSITORY / "ds_configs" / "README.md").read_text()
    for path in DEEPSPEED:
        assert path.name in readme


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    loaded = load_config_from_file(str(path))  # refuses unknown keys at the top level
    assert loaded.distributed_type == ("DEEPSPEED" if path.stem.startswith("deepspeed") else "FSDP")
    assert loaded.mixed_precision == "no"  # finetune.py's --bf16 decides


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_every_nested_key_is_an_option_of_accelerate_launch(path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    config = yaml.safe_load(path.read_text())
    nested = {**config.get("fsdp_config", {}), **config.get("deepspeed_config", {})}
    assert nested
    assert set(nested) <= options, set(nested) - options


@pytest.mark.parametrize("version", [1, 2])
def test_the_fsdp_plugin_becomes_what_the_file_says(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = launch_environment(f"fsdp{version}")
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "true"
    if version == 1:
        assert environment["FSDP_SYNC_MODULE_STATES"].lower() == "true"
        # the plugin would look for the accelerator to broadcast on
        environment |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == version
    assert "SHARDED_STATE_DICT" in str(plugin.state_dict_type)
    if version == 1:
        assert plugin.use_orig_params
        assert plugin.sharding_strategy.name == "FULL_SHARD"
    else:
        assert plugin.reshard_after_forward is True


def launch_environment(config: str) -> dict[str, str]:
    """The variables that ``accelerate launch --config_file`` gives the training script."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = REPOSITORY / "launchers" / "accelerate" / f"{config}.yaml"
    arguments: argparse.Namespace = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments = _validate_launch_command(arguments)[0]
    wanted = ("ACCELERATE_", "FSDP_")
    return {k: str(v) for k, v in prepare_multi_gpu_env(arguments).items() if k.startswith(wanted)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
