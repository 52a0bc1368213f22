"""accelerate's configuration file, read by the code of ``accelerate launch``."""

from __future__ import annotations

import contextlib
import difflib
import io
from typing import Any

from .files import ACCELERATE_SECTIONS, read
from .findings import Findings
from .fsdp_config import fsdp1, fsdp2
from .options import PRECISIONS, DoctorOptions
from .setup import Setup
from .values import count, truth

_DDP = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU")


def launch_arguments(path: str, config: dict[str, Any], findings: Findings) -> Any:
    """Return the arguments that ``accelerate launch --config_file`` would use; None if it refuses the file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    for section in ACCELERATE_SECTIONS:
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
            arguments, _, _ = _validate_launch_command(arguments)
    except Exception as error:  # ValueError, TypeError or KeyError, depending on the mistake
        findings.error(path, f"accelerate refuses it: {error}".replace("\n", " "), "correct or remove that key")
        return None
    return arguments


def deepspeed_contents(arguments: Any) -> dict[str, Any]:
    """Return the settings that accelerate's file passes to DeepSpeed, by DeepSpeed's keys.

    They are the contents of ``deepspeed_config_file`` if the file names one. Otherwise all absent keys are "auto".

    Raises:
        ValueError: ``deepspeed_config_file`` cannot be read.
    """
    file = getattr(arguments, "deepspeed_config_file", None)
    if file is not None:
        try:
            return read(str(file))
        except ValueError as error:
            raise ValueError(f"deepspeed_config_file {file}: {error}") from error
    names = ("gradient_accumulation_steps", "gradient_clipping")
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def check_ulysses(path: str, arguments: Any, ranks: int, findings: Findings) -> None:
    """Check ``parallelism_config`` beside DeepSpeed: ``sp_size`` ranks share each sequence.

    Args:
        path: the file, for findings.
        arguments: what :func:`launch_arguments` returned.
        ranks: number of ranks.
        findings: receives the problems.
    """
    if not arguments.use_parallelism_config:
        return
    sizes = {
        name: count(path, vars(arguments), f"parallelism_config_{name}_size", findings) or 1
        for name in ("dp_replicate", "sp", "dp_shard", "cp", "tp")
    }
    for name in ("dp_shard", "cp", "tp"):
        if sizes[name] > 1:
            findings.error(
                path, f"parallelism_config_{name}_size={sizes[name]}: not beside DeepSpeed", "leave it out, or set 1"
            )
    if sizes["dp_replicate"] * sizes["sp"] != ranks:
        findings.error(
            path,
            f"dp_replicate_size {sizes['dp_replicate']} x sp_size {sizes['sp']} is not {ranks}, the number of ranks",
            f"dp_replicate_size: {max(1, ranks // sizes['sp'])}",
        )


def accelerate_setup(
    path: str, arguments: Any, precision: str, options: DoctorOptions, size: tuple[int, int], findings: Findings
) -> Setup:
    """Return the setup of FSDP or DDP under this file.

    Args:
        path: the file, for findings.
        arguments: what :func:`launch_arguments` returned.
        precision: "no", "bf16" or "fp16".
        options: the doctor's options.
        size: numbers of ranks and machines.
        findings: receives the problems.
    """
    world_size, num_nodes = size
    setup = Setup(
        engine="ddp" if world_size > 1 else "single",
        world_size=world_size,
        num_nodes=num_nodes,
        precision=precision,
        micro_batch_size=options.micro_batch_size or 1,
        accumulation=options.gradient_accumulation_steps or 1,
        activation_checkpointing=options.activation_checkpointing,
    )
    version = int(arguments.fsdp_version) if arguments.use_fsdp else 0
    if version not in (0, 1, 2):
        findings.error(path, f"fsdp_version: {version} is unknown to accelerate", "fsdp_version: 2")
    if arguments.use_parallelism_config and version != 2:
        findings.error(path, "parallelism_config is for FSDP2 only", "fsdp_version: 2, or remove parallelism_config")
    if not version:
        return setup
    setup.offload_params = truth(arguments.fsdp_offload_params)
    setup.activation_checkpointing |= truth(arguments.fsdp_activation_checkpointing)
    setup.engine = f"fsdp{version}"
    if version == 1:
        fsdp1(path, arguments, setup, findings)
    else:
        fsdp2(path, arguments, setup, findings)
    return setup


def accelerate_precision(path: str, arguments: Any, options: DoctorOptions, findings: Findings) -> str | None:
    """Return the precision: the option's, else the file's; None if the file's is unusable.

    "no" in the file leaves the choice to the trainer, for which the doctor assumes ``--bf16``.
    """
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


def check_distributed_type(
    path: str, config: dict[str, Any], arguments: Any, world_size: int, findings: Findings
) -> bool:
    """Return whether the file's ``distributed_type`` is supported, and add its problems to the findings."""
    kind = str(config.get("distributed_type", "NO"))
    if kind not in (*_DDP, "FSDP", "DEEPSPEED"):
        findings.error(path, f"distributed_type: {kind} is not supported", "use FSDP, DEEPSPEED or MULTI_GPU")
        return False
    if kind == "FSDP" and truth(arguments.use_cpu):
        findings.error(path, "use_cpu: true makes accelerate train with plain DDP instead of FSDP", "use GPUs")
        return False
    if kind == "NO" and world_size > 1:
        findings.error(
            path,
            f"distributed_type: NO: accelerate launch starts one process, not {world_size}",
            "distributed_type: MULTI_GPU",
        )
        return False
    if kind == "MULTI_CPU" and world_size > 1 and not arguments.mpirun_hostfile:
        findings.warning(
            path,
            f"distributed_type: MULTI_CPU: accelerate launch starts one process, and only mpirun makes it {world_size}",
            "mpirun_config with an mpirun_hostfile, or distributed_type: MULTI_GPU with use_cpu: true",
        )
    if kind in _DDP and config.get("fsdp_config"):
        findings.warning(
            path,
            f"distributed_type: {kind} is DDP: fsdp_config has no effect",
            "distributed_type: FSDP, if it is meant",
        )
    if (count(path, config, "num_machines", findings) or 1) > 1 and not config.get("main_process_ip"):
        findings.note(path, "main_process_ip is left to the command line", "--main_process_ip")
    return True
