"""finetune.py under every engine's shipped configuration, its ranks forked."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tests.support.cluster import run_ranks
from tests.support.launchers import REPOSITORY


def launch_environment(config: str, *options: str) -> dict[str, str]:
    """The variables that ``accelerate launch --config_file`` gives the training script."""
    wanted = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {k: str(v) for k, v in accelerate_launch(config, *options)[1].items() if k.startswith(wanted)}


def accelerate_launch(config: str, *options: str) -> tuple[argparse.Namespace, dict[str, str]]:
    """What ``accelerate launch`` tells torch's launcher, and the variables it sets for the script."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = REPOSITORY / "launchers" / "accelerate" / f"{config}.yaml"
    command = ["--config_file", str(path), *options, "script.py"]
    arguments: argparse.Namespace = _validate_launch_command(launch_command_parser().parse_args(command))[0]
    if not arguments.use_deepspeed:
        return arguments, prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # what launch_command would put there is for its messages
    own_launcher, environment = prepare_deepspeed_cmd_env(arguments)
    assert own_launcher is None  # torch's is taken
    return arguments, environment


WORLD_SIZE = 2
HSDP_WORLD_SIZE = 4  # two copies of two shards


def finetune_options(folder: Path, output: str, **changes: Any) -> list[str]:
    options = {
        "model": folder / "model",
        "dataset": folder / "records.jsonl",
        "eval_fraction": 0.2,
        "output_dir": folder / output,
        "cache_dir": folder / "cache",
        "reflora_warmup_steps": 2,
        "lora_r": 4,
        "lora_alpha": 8,
        "max_length": 96,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def finetune_rank(rank: int, world_size: int, engine: str, argv: list[str]) -> None:
    """One rank of finetune.py with the environment that the engine's launcher would give it."""
    from launchers import finetune
    from tests.support.engines_under_test.accelerated import fsdp_on_cpu
    from tests.support.engines_under_test.zero import allow_fp16_on_cpu

    shim: Any = contextlib.nullcontext()
    if engine.startswith("fsdp"):
        sizes = ["--parallelism_config_dp_shard_size=2"] if engine == "fsdp2_hsdp" else []
        os.environ.update(launch_environment(engine, *sizes, f"--num_processes={world_size}"))
        # parts of the configuration that need an accelerator to broadcast on
        os.environ |= {"ACCELERATE_USE_CPU": "true", "FSDP_SYNC_MODULE_STATES": "false"}
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        shim = fsdp_on_cpu()
    elif engine.startswith("zero"):
        allow_fp16_on_cpu()
        argv = [f"--deepspeed={REPOSITORY / 'ds_configs' / f'{engine}.json'}", *argv]  # the last one counts
    with shim:
        finetune.main(argv)


def finetuned(folder: Path, output: str, engine: str, **changes: Any) -> dict[str, Any]:
    world_size = WORLD_SIZE
    if engine == "fsdp2_hsdp":
        world_size = HSDP_WORLD_SIZE
        changes = {"per_device_train_batch_size": 1, **changes}  # the same global batch
    elif engine == "zero3_fp16":
        changes = {"fp16": True, **changes}
    run_ranks(
        finetune_rank,
        world_size,
        engine,
        finetune_options(folder, output, **changes),
        timeout=240,
        init_process_group=False,
    )
    return json.loads((folder / output / "metrics.json").read_text())


STEPS, SAVE_STEPS, FAULT_AT = 8, 3, 5


def resumable_options(folder: Path, output: Path, **changes: Any) -> list[str]:
    options = {
        "model": folder / "model",
        "dataset": folder / "records.jsonl",
        "output_dir": output,
        "cache_dir": folder / "cache",
        "reflora_warmup_steps": 2,
        "lora_r": 4,
        "max_length": 96,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    return [f"--{name}={value}" for name, value in options.items()]
