"""Optimizers that may read refactored gradients, and those among them that keep Adam's moments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch

from ..engines.pairs import AdapterPair
from ..methods.base import OptimizerMethod
from ..methods.config import RefLoRAConfig
from ..methods.registry import METHODS
from .factor_optimizer import FactorOptimizer
from .method_optimizers import METHOD_OPTIMIZERS

# Class names by package. These classes update elementwise in the gradient, with one step per backward.
_ELEMENTWISE = {
    "torch": {"Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"},
    "deepspeed": {"DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedAdam", "FusedLion"},
    "apex": {"FusedAdam", "FusedSGD"},
    "bitsandbytes": {"Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "SGD"},
}
# These classes keep the moments exp_avg and exp_avg_sq in full precision.
_ADAM_FAMILY = {
    "torch": {"Adam", "AdamW", "NAdam", "RAdam"},
    "deepspeed": {"DeepSpeedCPUAdam", "FusedAdam"},
    "apex": {"FusedAdam"},
}


def check_optimizer(optimizer: torch.optim.Optimizer, config: RefLoRAConfig, pairs: Sequence[AdapterPair]) -> None:
    """Make sure that a method can work with an optimizer and with the adapters.

    Raises:
        ValueError: the optimizer is not known to be elementwise (others cannot use a refactored gradient, of which they
            may hold a flat piece only); its class overrides ``step``; a method that carries moments without one of the
            Adam family; "lora-rite" or "lora-muon" without its optimizer, or such an optimizer with another method; or,
            for these two, a tall factor has too few rows for its r.
    """
    name = type(optimizer).__name__
    method = METHODS[config.method]
    if issubclass(method, OptimizerMethod) or isinstance(optimizer, FactorOptimizer):
        _check_partner(optimizer, config.method)
        _check_sizes(pairs, config.method)
        return
    if not method.acts:
        return
    if method.carries_moments(config) and _listed(optimizer, _ADAM_FAMILY) is None:
        known = ", ".join(sorted(set().union(*_ADAM_FAMILY.values())))
        setting = " with carry_moments=True" if "carry_moments" in method.own_settings else ""
        raise ValueError(f"method={config.method!r}{setting} rescales Adam's moments; {name} is not one of {known}")
    base = _listed(optimizer, _ELEMENTWISE)
    if base is None:
        raise ValueError(
            f"{name} is not known to update elementwise, so its gradients cannot be refactored; use AdamW or another "
            "of torch.optim's elementwise optimizers"
        )
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(base.step):
        # Such a step may read or change gradients, as PEFT's does. torch also calls the hooks twice: in this step and
        # in the base class's step that it calls.
        raise ValueError(
            f"{name} has a step() of its own around {base.__name__}'s, which would refactor gradients twice or "
            f"wrongly: use {base.__name__} itself (method='scaled-gd' replaces PEFT's create_riemannian_optimizer)"
        )


def pairs_without_solution(pairs: Sequence[AdapterPair], config: RefLoRAConfig) -> list[int]:
    """Return the numbers of the pairs on which a method can never act: their r is above in or out.

    A Gram matrix of such a pair is singular.

    Raises:
        ValueError: the method can act on no pair.
    """
    if not METHODS[config.method].needs_full_rank:
        return []
    hopeless = [
        number for number, pair in enumerate(pairs) if pair.lora_rank > min(pair.in_features, pair.out_features)
    ]
    if len(hopeless) == len(pairs):
        pair = pairs[0]
        raise ValueError(
            f"r={pair.lora_rank} is above in={pair.in_features} or out={pair.out_features} of {pair.name}, and "
            f"likewise in all adapters: {config.method} has no solution for them, lower r"
        )
    return hopeless


def _check_partner(optimizer: torch.optim.Optimizer, method: str) -> None:
    kind = METHOD_OPTIMIZERS.get(method)
    if kind is not None and isinstance(optimizer, kind):
        return
    own = kind if kind is not None else type(optimizer)
    assert issubclass(own, FactorOptimizer)
    raise ValueError(
        f"method={method!r} with {type(optimizer).__name__}: {own.title} is an optimizer of its own, so RefLoRAConfig("
        f"method={own.method!r}) and reflora_dist.{own.__name__}(params, ...) need each other: use both or neither"
    )


def _check_sizes(pairs: Sequence[AdapterPair], method: str) -> None:
    kind = METHODS[method]
    assert issubclass(kind, OptimizerMethod)
    for pair in pairs:
        rows, least = min(pair.in_features, pair.out_features), pair.lora_rank
        if rows < least or rows * least < kind.packed_values(least):
            raise ValueError(
                f"method={method!r} needs r orthonormal directions in each factor, and {pair.name} has r={least} with "
                f"in={pair.in_features}, out={pair.out_features}: lower r there (rank_pattern) or leave it out"
            )


def _listed(optimizer: torch.optim.Optimizer, listed: dict[str, set[str]]) -> type[torch.optim.Optimizer] | None:
    """Return the first class of the optimizer's MRO that is listed, or None.

    bitsandbytes adds "Paged", "8bit" and "32bit" to the listed names.
    """
    for base in type(optimizer).__mro__:
        package = base.__module__.split(".")[0]
        name = base.__name__
        if package == "bitsandbytes":
            name = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
        if name in listed.get(package, ()):
            return base
    return None
