"""accelerate's YAML, read by what ``accelerate launch`` reads it with."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
from pathlib import Path
from typing import Any

import yaml

from .findings import Findings
from .options import PRECISIONS, DoctorOptions
from .setup import Setup
from .values import check_sections, count

_NESTED = ("fsdp_config", "deepspeed_config", "parallelism_config")
_DDP = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU")
_OTHER_PARALLELISM = {"tp": "tensor", "cp": "context", "sp": "sequence"}


def read(path: str) -> dict[str, Any]:
    """The file's contents.

    Raises:
        ValueError: it cannot be read, or it or a section is no mapping.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(str(error).replace("\n", " ")) from error
    if not isinstance(config, dict):
        raise ValueError(f"an accelerate configuration is a mapping, this is a {type(config).__name__}")
    check_sections(config, [(name,) for name in _NESTED])
    return config


def launch_arguments(path: str, config: dict[str, Any], findings: Findings) -> Any:
    """The arguments that ``accelerate launch --config_file`` arrives at; None if it refuses."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    for section in _NESTED:
        for key in config.get(section) or {}:
            full = f"fsdp_{key}" if section == "fsdp_config" and not key.startswith("fsdp") else key
            if full not in known:
                close = difflib.get_close_matches(full, known, n=1)
                findings.warning(
                    path,
                    f"{section}.{key} is no option of accelerate launch and has no effect",
                    f"did you mean {close[0]!r}?" if close else "",
                )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            arguments = parser.parse_args(["--config_file", path, "script.py"])
            arguments, _, has_precision = _validate_launch_command(arguments)
    except Exception as error:  # ValueError, TypeError and KeyError, by what is wrong
        findings.error(path, f"accelerate refuses it: {error}".replace("\n", " "), "correct or remove that key")
        return None
    # as launch_command does, for DeepSpeedPlugin to compare with deepspeed_config_file
    fields = [*(config.get("deepspeed_config") or {}), *["mixed_precision"] * has_precision]
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    return arguments


def deepspeed_contents(path: str, arguments: Any, options: DoctorOptions, findings: Findings) -> dict[str, Any] | None:
    """The DeepSpeed configuration that accelerate makes of the file; None if it refuses."""
    from accelerate import DeepSpeedPlugin
    from accelerate.utils import patch_environment
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    precision = _precision(path, arguments, options, findings)
    if precision is None:
        return None
    names = ("gradient_clipping", "zero_stage", "offload_optimizer_device", "offload_param_device",
             "offload_optimizer_nvme_path", "offload_param_nvme_path", "zero3_init_flag",
             "zero3_save_16bit_model")  # fmt: skip
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    given["gradient_accumulation_steps"] = getattr(arguments, "gradient_accumulation_steps", None) or "auto"
    file = getattr(arguments, "deepspeed_config_file", None)
    try:
        with patch_environment(ACCELERATE_CONFIG_DS_FIELDS=arguments.deepspeed_fields_from_accelerate_config):
            plugin = DeepSpeedPlugin(hf_ds_config=file, **given)
        if file is None:
            plugin.set_mixed_precision(precision)
        return plugin.deepspeed_config
    except Exception as error:
        findings.error(path, f"accelerate's DeepSpeedPlugin refuses it: {error}".replace("\n", " "), "")
        return None
    finally:
        unset_hf_deepspeed_config()


def accelerate_setup(
    path: str, arguments: Any, options: DoctorOptions, size: tuple[int, int], findings: Findings
) -> Setup | None:
    """What FSDP or DDP would do by this file; None if it cannot work."""
    world_size, num_nodes = size
    precision = _precision(path, arguments, options, findings)
    if precision is None:
        return None
    setup = Setup(
        engine="ddp" if world_size > 1 else "single",
        world_size=world_size,
        num_nodes=num_nodes,
        precision=precision,
        micro_batch_size=options.micro_batch_size or 1,
        accumulation=options.gradient_accumulation_steps or arguments.gradient_accumulation_steps or 1,
        activation_checkpointing=options.activation_checkpointing,
    )
    if arguments.use_fsdp and not _fsdp_plugin_accepts(path, arguments, findings):
        return None
    version = int(arguments.fsdp_version) if arguments.use_fsdp else 0
    if arguments.use_parallelism_config and version != 2:
        findings.error(path, "parallelism_config is for FSDP2 only", "fsdp_version: 2, or remove parallelism_config")
    if not version:
        return setup
    setup.offload_params = bool(_truth(arguments.fsdp_offload_params))
    setup.activation_checkpointing |= bool(_truth(arguments.fsdp_activation_checkpointing))
    setup.engine = f"fsdp{version}"
    if version == 1:
        _fsdp1(path, arguments, setup, findings)
    else:
        _fsdp2(path, arguments, setup, findings)
    return setup


def _fsdp_plugin_accepts(path: str, arguments: Any, findings: Findings) -> bool:
    """Whether accelerate's plugin can be made of the variables that its launcher would set."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import patch_environment
    from accelerate.utils.launch import prepare_multi_gpu_env

    version = arguments.fsdp_version
    if str(version) not in ("1", "2"):
        findings.error(path, f"fsdp_version: {version!r} is unknown to accelerate", "fsdp_version: 2")
        return False
    # one machine and any port: the launcher would look whether the port is free
    launched = {**vars(arguments), "num_machines": 1, "main_process_port": 0, "mixed_precision": "no"}
    try:
        environment = prepare_multi_gpu_env(argparse.Namespace(**launched))
        variables = {name: value for name, value in environment.items() if name.startswith("FSDP_")}
        # with these the plugin would look for the accelerator to broadcast on
        variables |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_SYNC_MODULE_STATES": "false"}
        with patch_environment(**variables):
            FullyShardedDataParallelPlugin()
    except Exception as error:  # KeyError, ValueError and others, by what is wrong
        message = f"accelerate refuses it with fsdp_version: {version}: {type(error).__name__}: {error}"
        findings.error(path, message.replace("\n", " "), "correct or remove that key")
        return False
    return True


def _precision(path: str, arguments: Any, options: DoctorOptions, findings: Findings) -> str | None:
    """The option, else the file's; "no" there leaves it to the trainer's --bf16. None if the file's is unusable."""
    said = arguments.mixed_precision if isinstance(arguments.mixed_precision, str) else repr(arguments.mixed_precision)
    said = said.lower()
    if said not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        hint = ' (write it quoted: "no")' if said == "false" else ""
        findings.error(path, f"mixed_precision: {said} is not supported", f"use one of {known}{hint}")
        return None
    if options.mixed_precision is not None:
        if said not in ("no", options.mixed_precision):
            findings.error(
                path, f"--mixed_precision {options.mixed_precision}, but this file says {said!r}", "say it in one place"
            )
        return options.mixed_precision
    if said != "no":
        return said
    findings.note(
        path, "mixed_precision is 'no', which leaves it to the trainer: taken to be bf16", "--mixed_precision"
    )
    return "bf16"


def _truth(value: object) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _fsdp1(path: str, arguments: Any, setup: Setup, findings: Findings) -> None:
    strategy = str(arguments.fsdp_sharding_strategy or "FULL_SHARD").upper()
    strategy = {"1": "FULL_SHARD", "2": "SHARD_GRAD_OP", "3": "NO_SHARD", "4": "HYBRID_SHARD"}.get(strategy, strategy)
    setup.shard_size = setup.world_size
    if strategy.startswith(("HYBRID", "_HYBRID")):
        setup.shard_size = setup.ranks_per_node
    if strategy == "NO_SHARD":
        setup.shard_size = 1
    setup.reshard_after_forward = strategy in ("FULL_SHARD", "HYBRID_SHARD")
    original = _truth(arguments.fsdp_use_orig_params)
    if strategy == "NO_SHARD" and not original:
        findings.error(path, "NO_SHARD without fsdp_use_orig_params: attach refuses it", "fsdp_use_orig_params: true")
    if setup.offload_params:
        findings.warning(path, "FSDP1 with fsdp_offload_params is not tested", "use FSDP2")


def _fsdp2(path: str, arguments: Any, setup: Setup, findings: Findings) -> None:
    reshard = arguments.fsdp_reshard_after_forward
    setup.reshard_after_forward = reshard is None or str(reshard).lower() not in ("false", "0", "no")
    setup.shard_size = setup.world_size
    if not getattr(arguments, "use_parallelism_config", False):
        return
    sizes = {
        name: count(path, vars(arguments), f"parallelism_config_{name}_size", findings) or 1
        for name in ("dp_replicate", "dp_shard", *_OTHER_PARALLELISM)
    }
    for name, kind in _OTHER_PARALLELISM.items():
        if sizes[name] > 1:
            findings.error(
                path,
                f"parallelism_config_{name}_size={sizes[name]}: {kind} parallelism is not supported",
                "leave it out, or set 1",
            )
    total = sizes["dp_replicate"] * sizes["dp_shard"]
    if total != setup.world_size:
        findings.error(
            path,
            f"dp_replicate_size {sizes['dp_replicate']} x dp_shard_size {sizes['dp_shard']} is {total}, but there are "
            f"{setup.world_size} ranks",
            f"dp_shard_size: the ranks of a machine, {setup.ranks_per_node}; dp_replicate_size: the machines, "
            f"{setup.num_nodes}; or --world_size {total}",
        )
    elif sizes["dp_replicate"] > 1:
        setup.shard_size = sizes["dp_shard"]
        if setup.ranks_per_node % sizes["dp_shard"]:
            findings.warning(
                path,
                f"dp_shard_size {sizes['dp_shard']} does not divide the {setup.ranks_per_node} ranks of a machine: "
                "parameters are gathered between machines",
                f"dp_shard_size: {setup.ranks_per_node}",
            )


def check_distributed_type(path: str, config: dict[str, Any], arguments: Any, findings: Findings) -> bool:
    """Whether the kind of parallelism is one that works here."""
    kind = str(config.get("distributed_type", "NO"))
    if kind not in (*_DDP, "FSDP", "DEEPSPEED"):
        findings.error(path, f"distributed_type: {kind} is not supported", "use FSDP, DEEPSPEED or MULTI_GPU")
        return False
    if kind == "FSDP" and _truth(arguments.use_cpu):
        findings.error(path, "use_cpu: true, for which accelerate trains with plain DDP instead of FSDP", "use GPUs")
        return False
    if (count(path, config, "num_machines", findings) or 1) > 1 and not config.get("main_process_ip"):
        findings.note(path, "main_process_ip is left to the command line", "--main_process_ip")
    return True
