"""Every shipped configuration is read by the library that it is for, without unknown keys."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from tests.support.finetune import accelerate_launch, launch_environment
from tests.support.launchers import REPOSITORY

DEEPSPEED = sorted((REPOSITORY / "ds_configs").glob("*.json"))
ACCELERATE = sorted((REPOSITORY / "launchers" / "accelerate").glob("*.yaml"))
SCRIPTS = sorted([*(REPOSITORY / "launchers").glob("*.sh"), *(REPOSITORY / "launchers" / "slurm").iterdir()])
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_fp16": 3, "zero3_hpz": 3, "zero3_offload": 3}
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
    assert [path.stem for path in ACCELERATE] == [
        *("deepspeed_zero3", "deepspeed_zero3_ulysses"),
        *("fsdp1", "fsdp2", "fsdp2_context_parallel", "fsdp2_hsdp"),
    ]


class _Recording(dict[str, Any]):
    """A configuration that notes which of its keys are looked up: one that DeepSpeed never reads is unknown to it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _load(config: dict[str, Any]) -> DeepSpeedConfig:
    """What DeepSpeed makes of it.

    Raises:
        ValueError: a key is unknown at the top (sections refuse unknown keys themselves), or deprecated anywhere.
    """
    deprecated = []
    recording = _Recording(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DeepSpeedConfigModel,
            "_process_deprecated_field",
            lambda section, key: deprecated.append(key) if key in section.model_fields_set else None,
        )
        loaded = DeepSpeedConfig(recording)
    unknown = set(config) - recording.read
    if unknown or deprecated:
        raise ValueError(f"unknown: {sorted(unknown)}, deprecated: {deprecated}")
    return loaded


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_reads_it(path: Path, precision: str) -> None:
    """With the precision that finetune.py's options choose; a file for one precision is read with it alone."""
    config = _filled(json.loads(path.read_text()))
    if path.stem == "zero3_fp16":
        precision = "fp16"
    if precision != "fp32":
        config[precision]["enabled"] = True
    loaded = _load(config)
    assert loaded.zero_optimization_stage == STAGES[path.stem]
    assert loaded.gradient_clipping == 0.5
    assert loaded.bfloat16_config.enabled == (precision == "bf16")
    assert loaded.float16_config.enabled == (precision == "fp16")
    assert loaded.zero_config.zero_hpz_partition_size == (8 if path.stem == "zero3_hpz" else 1)


@pytest.mark.parametrize(
    "keys",
    [
        ("gradient_cliping",),
        ("zero_optimization", "stage3_prefetch_buckets"),
        ("zero_optimization", "offload_optimizer", "pinned"),
        ("fp16", "scale_window"),
        ("bf16", "scale_window"),
        ("zero_optimization", "cpu_offload"),
        ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"),
    ],
    ids=lambda keys: ".".join(keys),
)
def test_a_key_that_is_unknown_or_deprecated_is_noticed(keys: tuple[str, ...]) -> None:
    config = _filled(json.loads((REPOSITORY / "ds_configs" / "zero3_offload.json").read_text()))
    section = config
    for name in keys[:-1]:
        section = section[name]
    section[keys[-1]] = True
    with pytest.raises(ValueError, match=keys[-1]):
        _load(config)


def test_deepspeed_reads_quantized_nontrainable_weights() -> None:
    """The one part of ZeRO++ that is read and no more: its kernels are CUDA's."""
    config = _filled(json.loads((REPOSITORY / "ds_configs" / "zero3_hpz.json").read_text()))
    config["zero_optimization"]["zero_quantized_nontrainable_weights"] = True
    assert _load(config).zero_config.zero_quantized_nontrainable_weights


def test_every_file_and_key_is_explained() -> None:
    """JSON holds no comments, so the README beside the files has a row for each key that is not plain."""
    readme = (REPOSITORY / "ds_configs" / "README.md").read_text()
    explained = set(re.findall(r"`([a-z0-9_]+)`", readme))
    for path in DEEPSPEED:
        assert f"`{path.name}`" in readme
        assert _keys(json.loads(path.read_text())) <= explained, path.name


def _keys(config: dict[str, Any]) -> set[str]:
    return set(config) | {key for value in config.values() if isinstance(value, dict) for key in _keys(value)}


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
    nested = {key for section in config.values() if isinstance(section, dict) for key in section}
    assert nested
    assert nested <= options, nested - options


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_no_key_is_without_effect(path: Path) -> None:
    """accelerate takes a key of the file only where the option of that name has no default of its own."""
    from accelerate.commands.launch import launch_command_parser

    defaults = {action.dest: action.default for action in launch_command_parser()._actions}
    ignored = [key for key in yaml.safe_load(path.read_text()) if defaults.get(key) is not None]
    assert not ignored


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_a_nested_key_that_is_not_plain_has_a_comment(path: Path) -> None:
    plain = {"fsdp_version", "zero_stage", "fsdp_sharding_strategy", "fsdp_forward_prefetch", "fsdp_offload_params"}
    plain |= {"offload_optimizer_device", "offload_param_device"}
    for line in path.read_text().splitlines():
        if line.startswith("  ") and line.split(":")[0].strip() not in plain:
            assert "#" in line, line


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_the_command_line_makes_it_one_of_several_machines(path: Path) -> None:
    """What accelerate then hands torch's launcher on the second of two machines."""
    several = ["--num_machines=2", "--machine_rank=1", "--num_processes=16"]
    several += ["--main_process_ip=10.0.0.1", "--main_process_port=29500"]
    sizes = {"fsdp2_context_parallel": "dp_shard", "deepspeed_zero3_ulysses": "dp_replicate"}
    if path.stem in sizes:
        several += [f"--parallelism_config_{sizes[path.stem]}_size=8"]
    if path.stem == "fsdp2_hsdp":
        several += ["--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=8"]
    arguments, environment = accelerate_launch(path.stem, *several)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")
    if path.stem in sizes:
        assert environment[f"PARALLELISM_CONFIG_{sizes[path.stem].upper()}_SIZE"] == "8"
        shared = environment["PARALLELISM_CONFIG_CP_SIZE"], environment["PARALLELISM_CONFIG_SP_SIZE"]
        assert shared == (("2", "1") if "context" in path.stem else ("1", "2"))
    if path.stem == "fsdp2_hsdp":
        assert environment["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
        assert environment["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"


@pytest.mark.parametrize("name", ["fsdp2_hsdp", "fsdp2_context_parallel", "deepspeed_zero3_ulysses"])
def test_there_are_as_many_ranks_as_in_the_mesh(name: str) -> None:
    config = yaml.safe_load((REPOSITORY / "launchers" / "accelerate" / f"{name}.yaml").read_text())
    sizes = [size for key, size in config["parallelism_config"].items() if key.endswith("_size")]
    assert math.prod(sizes) == config["num_processes"]


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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_reads_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)


@pytest.mark.parametrize(
    ("config", "machines", "processes", "expected"),
    [
        ("fsdp2_hsdp", 1, 8, "2 4"),
        ("fsdp2_hsdp", 4, 8, "4 8"),
        ("fsdp2_hsdp", 1, 2, "do not make 2 copies"),
        ("fsdp2_hsdp", 2, 1, "do not make 2 copies"),
        ("fsdp2_context_parallel", 1, 8, "4"),
        ("fsdp2_context_parallel", 4, 8, "16"),
        ("deepspeed_zero3_ulysses", 4, 8, "16"),
        ("deepspeed_zero3_ulysses", 1, 3, "cannot share sequences by 2"),
        ("fsdp2_context_parallel", 1, 3, "cannot share sequences by 2"),
        ("fsdp2", 1, 3, ""),
    ],
)
def test_the_mesh_follows_the_number_of_machines(config: str, machines: int, processes: int, expected: str) -> None:
    """One copy per machine, on one machine two; what cannot be is refused before anything starts."""
    launchers = REPOSITORY / "launchers"
    command = f'. "$0"; set_mesh_options "$1" {machines}; echo "${{mesh_options[@]}}"'
    done = subprocess.run(
        ["bash", "-euc", command, launchers / "environment.sh", launchers / "accelerate" / f"{config}.yaml"],
        env={**os.environ, "PROCESSES": str(processes)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    if expected and not expected.replace(" ", "").isdigit():
        assert done.returncode and expected in done.stderr
    else:
        assert " ".join(re.findall(r"_size (\d+)", done.stdout)) == expected
