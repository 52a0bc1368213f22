"""Check of the optimizer that DeepSpeed's configuration names."""

from __future__ import annotations

from typing import Any

import torch

from ..methods.registry import METHODS
from ..step.method_optimizers import METHOD_OPTIMIZERS
from ..step.supported_optimizers import _ADAM_FAMILY, _ELEMENTWISE
from .findings import Findings
from .options import OPTIMIZERS, DoctorOptions

# Classes of DeepSpeed's own optimizers, by their lower-case names in its configuration.
_OWN_OPTIMIZERS = {"adam": "FusedAdam", "adamw": "FusedAdam", "adagrad": "DeepSpeedCPUAdagrad", "lion": "FusedLion"}
_OWN_MOMENTS = {"FusedAdam": 2, "DeepSpeedCPUAdagrad": 1, "FusedLion": 1}


def check_optimizer(
    where: str, filled: dict[str, Any], loaded: Any, options: DoctorOptions, findings: Findings
) -> None:
    """Find out whether attach accepts the optimizer that the file names."""
    offload = loaded.zero_config.offload_optimizer
    offloaded = offload is not None and offload.device != "none"
    name = loaded.optimizer_name
    if "optimizer" in filled and name is None:
        findings.error(where, "optimizer without type: DeepSpeed makes none", 'give its "type", or remove the section')
    if name is None:
        if offloaded and loaded.zero_force_ds_cpu_optimizer:
            findings.warning(
                where,
                "offload_optimizer without an optimizer section: deepspeed.initialize refuses all optimizers but "
                "DeepSpeedCPUAdam, so accelerate and Trainer replace AdamW by it",
                "in DeepSpeed's JSON (accelerate's deepspeed_config_file) name the optimizer, or set "
                '"zero_force_ds_cpu_optimizer": false',
            )
        return
    if options.method in METHOD_OPTIMIZERS:
        kind = METHOD_OPTIMIZERS[options.method]
        findings.error(
            where,
            f"the optimizer section ({name}) would replace {kind.__name__}, which is the method",
            'take "optimizer" out, and with offload_optimizer set "zero_force_ds_cpu_optimizer": false',
        )
        return
    kind = _OWN_OPTIMIZERS.get(name, name)
    config = options.reflora_config()
    carries_moments = METHODS[config.method].carries_moments(config)
    known = set().union(*(_ADAM_FAMILY if carries_moments else _ELEMENTWISE).values())
    if kind not in known and options.method != "lora":
        findings.error(
            where,
            f"optimizer.type={name!r} is not known to "
            + ("keep Adam's moments" if carries_moments else "update elementwise")
            + f", so attach refuses it with method={options.method!r}",
            "use AdamW",
        )


def count_moments(where: str, loaded: Any, options: DoctorOptions, findings: Findings) -> int | None:
    """Return how many state tensors of a factor's size the file's optimizer keeps.

    None if the file names no optimizer, or an unknown one.
    """
    name = loaded.optimizer_name
    if name is None:
        return None
    moments = _OWN_MOMENTS.get(_OWN_OPTIMIZERS.get(name, name))
    kind = getattr(torch.optim, name, None)
    if moments is None and isinstance(kind, type):
        factor = torch.nn.Parameter(torch.zeros(2, 3))
        factor.grad = torch.zeros_like(factor)
        optimizer = kind([factor], **(loaded.optimizer_params or {}))
        optimizer.step()
        state = optimizer.state[factor].values()
        moments = sum(torch.is_tensor(value) and value.shape == factor.shape for value in state)
    if moments is not None and options.optim is not None and OPTIMIZERS[options.optim] != moments:
        findings.error(
            where,
            f"--optim {options.optim}, but this file's optimizer is {name}, with {moments} moments",
            "say it in one place",
        )
    return moments
