"""The optimizer and the scheduler that DeepSpeed's JSON names."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..step.supported_optimizers import _ADAM_FAMILY, _ELEMENTWISE
from .findings import Findings
from .options import OPTIMIZERS, DoctorOptions
from .values import is_number, one_line

# DeepSpeed's names, in lower case, of optimizers that are not torch's.
_OWN_OPTIMIZERS = {"adam": "FusedAdam", "adamw": "FusedAdam", "adagrad": "DeepSpeedCPUAdagrad", "lion": "FusedLion"}
_ADAMS = ("adam", "adamw")
_TAKEN_OUT = {"torch_adam", "adam_w_mode"}  # of Adam's parameters, by DeepSpeed itself
_PASSED_ON = {"adamw_mode"}  # by DeepSpeed to its DeepSpeedCPUAdam, so that nobody else may
_OWN_MOMENTS = {"FusedAdam": 2, "DeepSpeedCPUAdagrad": 1, "FusedLion": 1}


def check_optimizer(where: str, loaded: Any, options: DoctorOptions, findings: Findings) -> None:
    """Whether attach takes what the file names, and DeepSpeed what it leaves to the program."""
    offload = loaded.zero_config.offload_optimizer
    offloaded = offload is not None and offload.device != "none"
    name = loaded.optimizer_name
    if name is None:
        if options.method == "lora-rite" and not loaded.zero_allow_untested_optimizer:
            findings.warning(
                where,
                "DeepSpeed takes LoRARite only with zero_allow_untested_optimizer, which Trainer sets by itself",
                'set "zero_allow_untested_optimizer": true',
            )
        if offloaded and loaded.zero_force_ds_cpu_optimizer:
            report = findings.error if options.method == "lora-rite" else findings.warning
            report(
                where,
                "offload_optimizer without an optimizer section: deepspeed.initialize refuses optimizers but "
                "DeepSpeedCPUAdam, for which accelerate and Trainer exchange AdamW",
                "in DeepSpeed's JSON (accelerate's deepspeed_config_file) name the optimizer, or set "
                '"zero_force_ds_cpu_optimizer": false',
            )
        return
    if options.method == "lora-rite":
        findings.error(
            where,
            f"the optimizer section ({name}) would replace LoRARite, which is the method",
            'take "optimizer" out, and with offload_optimizer set "zero_force_ds_cpu_optimizer": false',
        )
        return
    kind = _OWN_OPTIMIZERS.get(name, name)
    known = set().union(*(_ADAM_FAMILY if options.method == "reflora-s" else _ELEMENTWISE).values())
    if kind not in known and options.method != "lora":
        findings.error(
            where,
            f"optimizer.type={name!r} is not known to "
            + ("keep Adam's moments" if options.method == "reflora-s" else "update elementwise")
            + f", so attach refuses it with method={options.method!r}",
            "use AdamW",
        )
    elif kind == name and not hasattr(torch.optim, name):
        findings.error(where, f"optimizer.type={name!r} is neither DeepSpeed's nor torch's", "use AdamW")
    elif loaded.zero_optimization_stage and not loaded.zero_allow_untested_optimizer and not _is_known_to_zero(kind):
        findings.error(
            where,
            f"optimizer.type={name!r}: DeepSpeed refuses it under ZeRO without zero_allow_untested_optimizer",
            'set "zero_allow_untested_optimizer": true, or use AdamW',
        )


def _is_known_to_zero(kind: str) -> bool:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    return kind in {each.__name__ for each in ZERO_SUPPORTED_OPTIMIZERS}


def count_moments(where: str, loaded: Any, options: DoctorOptions, findings: Findings) -> int | None:
    """Tensors of a factor's size that the file's optimizer keeps; None if there is none, or it cannot be told."""
    name = loaded.optimizer_name
    if name is None:
        return None
    moments = _OWN_MOMENTS.get(_OWN_OPTIMIZERS.get(name, name))
    kind = getattr(torch.optim, name, None)
    if moments is None and isinstance(kind, type):
        factor = torch.nn.Parameter(torch.zeros(2, 3))
        factor.grad = torch.zeros_like(factor)
        try:
            optimizer = kind([factor], **(loaded.optimizer_params or {}))
            optimizer.step()
        except Exception as error:  # by what is wrong with the hyperparameters
            findings.error(where, f"torch's {name} refuses optimizer.params: {one_line(error)}", "correct that key")
            return None
        state = optimizer.state[factor].values()
        moments = sum(torch.is_tensor(value) and value.shape == factor.shape for value in state)
    if moments is not None and options.optim is not None and OPTIMIZERS[options.optim] != moments:
        findings.error(
            where,
            f"--optim {options.optim}, but this file's optimizer is {name}, with {moments} moments",
            "say it in one place",
        )
    return moments


def check_optimizer_params(where: str, loaded: Any, findings: Findings) -> None:
    """Whether one of DeepSpeed's own optimizers takes the file's; torch's are made to count their moments."""
    kinds = _own_classes().get(loaded.optimizer_name)
    params = loaded.optimizer_params or {}
    if kinds is None:
        return
    known = {name for kind in kinds for name in _parameters(kind)} - _PASSED_ON
    if loaded.optimizer_name in _ADAMS:
        known |= _TAKEN_OUT
    _check_names(where, "optimizer", loaded.optimizer_name, params, known, findings)
    if loaded.optimizer_name in _ADAMS and params.get("torch_adam"):
        own = {name: value for name, value in params.items() if name not in _TAKEN_OUT | _PASSED_ON}
        try:
            torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **own)
        except Exception as error:  # by what is wrong with the hyperparameters
            findings.error(where, f"torch's AdamW refuses optimizer.params: {one_line(error)}", "correct that key")
            return
    numbers = {name: params[name] for name in ("lr", "eps", "weight_decay") if name in params}
    numbers |= {f"betas[{index}]": value for index, value in enumerate(params.get("betas", ()))}
    for name, value in numbers.items():
        if not is_number(value):
            findings.error(where, f"optimizer.params.{name}: {value!r} is no number", "correct it")


def _own_classes() -> dict[str, list[type]]:
    """What DeepSpeed may make of its names, by device and offload."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    adam = [torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam]
    return {
        "adam": adam,
        "adamw": adam,
        "adagrad": [torch.optim.Adagrad, DeepSpeedCPUAdagrad],
        "lion": [FusedLion, DeepSpeedCPULion],
    }


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """What a constructor takes beside what is optimized, or beside the optimizer."""
    return dict(list(inspect.signature(kind).parameters.items())[1:])


def _check_names(
    where: str, section: str, kind: str, params: dict[str, Any], known: set[str], findings: Findings
) -> None:
    for name in sorted(set(params) - known):
        findings.error(
            where, f"{section}.params.{name}: {kind} has no such parameter", f"it has {', '.join(sorted(known))}"
        )


def check_scheduler(where: str, loaded: Any, findings: Findings) -> None:
    """Whether the engine finds the scheduler that the file names, and can make it."""
    from deepspeed.runtime import lr_schedules

    name, params = loaded.scheduler_name, loaded.scheduler_params
    if name is None:
        return
    kind = getattr(lr_schedules, str(name), None) or getattr(torch.optim.lr_scheduler, str(name), None)
    if not isinstance(kind, type):
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        findings.error(where, f"scheduler.type={name!r} is neither DeepSpeed's nor torch's", f"use one of {known}")
        return
    if params is None:
        findings.error(where, "scheduler without params: DeepSpeed fails on it", '"params": {}')
    parameters = _parameters(kind)
    _check_names(where, "scheduler", name, params or {}, set(parameters), findings)
    needed = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    for key in sorted(needed - set(params or {})):
        findings.error(where, f"scheduler.params.{key} is absent, and {name} needs it", "give it")
