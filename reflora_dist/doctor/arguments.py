"""The trainer's options for a rehearsal: the doctor's own, else those that the configuration file asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

from .options import DoctorOptions
from .values import is_number

_OPTIMS = {"sgd": "sgd", "sgd-momentum": "sgd"}
_LARGEST = 1e300
_HYPERPARAMETERS = {
    "learning_rate": ("lr", "warmup_max_lr"),
    "adam_epsilon": ("eps",),
    "weight_decay": ("weight_decay",),
}


def training_arguments(config: dict[str, Any], precision: str, options: DoctorOptions, ranks: int) -> dict[str, Any]:
    """Return the TrainingArguments that differ from their defaults.

    transformers compares them with the numbers in the file. Where the doctor has no option, the arguments are assumed
    to match the file, if a command line can express its value.

    Args:
        config: DeepSpeed's configuration; empty under other engines.
        precision: "no", "bf16" or "fp16".
        options: the doctor's options.
        ranks: number of ranks of the run.
    """
    micro_batch_size, accumulation = _batch(config, options, ranks)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        **_hyperparameters(config),
    }
    if (clipping := _real(config, "gradient_clipping")) is not None:
        arguments["max_grad_norm"] = clipping
    if options.optim in _OPTIMS:
        arguments["optim"] = _OPTIMS[options.optim]
    if options.activation_checkpointing:
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        newer = "activation_checkpointing"
        arguments[newer if newer in names else "gradient_checkpointing"] = True
    return arguments


def section(config: dict[str, Any], *path: str) -> dict[str, Any]:
    """Return a section of a configuration; empty if it is absent or not a mapping."""
    inner: Any = config
    for name in path:
        inner = inner.get(name) if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) else {}


def deepspeed_precision(config: dict[str, Any], options: DoctorOptions) -> str:
    """Return the precision: the option's, else what the file enables, else bf16 or fp16 if "auto", else "no"."""
    if options.mixed_precision is not None:
        return options.mixed_precision
    enabled = {name: section(config, name).get("enabled") for name in ("bf16", "fp16")}
    chosen = [name for name in enabled if enabled[name] is True] or [n for n in enabled if enabled[n] == "auto"]
    return chosen[0] if chosen else "no"


def _batch(config: dict[str, Any], options: DoctorOptions, ranks: int) -> tuple[int, int]:
    """Return micro batch and accumulation: the options', else the file's, else derived from its train_batch_size."""
    micro_batch_size = options.micro_batch_size or _whole(config, "train_micro_batch_size_per_gpu")
    accumulation = options.gradient_accumulation_steps or _whole(config, "gradient_accumulation_steps")
    of_each = (_whole(config, "train_batch_size") or 0) // ranks
    if micro_batch_size is None:
        micro_batch_size = of_each // (accumulation or 1) or 1
    if accumulation is None:
        accumulation = of_each // (micro_batch_size or 1) or 1
    return micro_batch_size, accumulation


def _whole(config: dict[str, Any], name: str) -> int | None:
    value = config.get(name)
    return int(value) if isinstance(value, int | float) and is_number(value) and value == value // 1 else None


def _real(config: dict[str, Any], name: str) -> float | None:
    value = config.get(name)
    return float(value) if isinstance(value, int | float) and is_number(value) and abs(value) < _LARGEST else None


def _hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    optimizer, scheduler = section(config, "optimizer", "params"), section(config, "scheduler", "params")
    params = scheduler | optimizer
    arguments: dict[str, Any] = {}
    for argument, names in _HYPERPARAMETERS.items():
        values = [value for name in names if (value := _real(params, name)) is not None]
        if values:
            arguments[argument] = values[0]
    betas = params.get("betas")
    if isinstance(betas, list) and len(betas) == 2:
        both = {f"adam_beta{index}": _real({"": beta}, "") for index, beta in enumerate(betas, start=1)}
        arguments |= both if None not in both.values() else {}
    steps = {name: _whole(scheduler, name) for name in ("total_num_steps", "warmup_num_steps")}
    arguments["max_steps"] = max(1, steps["total_num_steps"] or 100)
    arguments["warmup_steps"] = max(0, steps["warmup_num_steps"] or 0)
    return arguments
