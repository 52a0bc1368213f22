"""Which optimizers may read refactored gradients, and which of them keep Adam's moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .adapters import AdapterPair
from .config import RefLoRAConfig
from .lora_rite import LoRARite
from .update import packed_size

# Package of the class, class names: elementwise in the gradient, one step per backward.
_ELEMENTWISE = {
    "torch": {"Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"},
    "deepspeed": {"DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedAdam", "FusedLion"},
    "apex": {"FusedAdam", "FusedSGD"},
    "bitsandbytes": {"Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "SGD"},
}
# Of these the moments are known: exp_avg and exp_avg_sq, in full precision.
_ADAM_FAMILY = {
    "torch": {"Adam", "AdamW", "NAdam", "RAdam"},
    "deepspeed": {"DeepSpeedCPUAdam", "FusedAdam"},
    "apex": {"FusedAdam"},
}


def check_optimizer(optimizer: torch.optim.Optimizer, config: RefLoRAConfig, pairs: Sequence[AdapterPair] = ()) -> None:
    """Make sure that a method can work with an optimizer, and with the adapters.

    Raises:
        ValueError: the optimizer is not known to be elementwise (a refactored, perhaps flat and partial gradient
            means nothing to others), or, for "reflora-s", not one of the Adam family; or "lora-rite" without LoRARite,
            or with a factor of less than r rows.
    """
    name = type(optimizer).__name__
    if (config.method == "lora-rite") != isinstance(optimizer, LoRARite):
        raise ValueError(
            f"method={config.method!r} with {name}: LoRA-RITE is an optimizer of its own, so RefLoRAConfig("
            "method='lora-rite') and reflora_dist.LoRARite(params, ...) go together, and neither with another"
        )
    if config.method == "lora-rite":
        _check_sizes(pairs)
        return
    if config.method == "reflora-s" and not _is_listed(optimizer, _ADAM_FAMILY):
        known = ", ".join(sorted(set().union(*_ADAM_FAMILY.values())))
        raise ValueError(f"method='reflora-s' rescales Adam's moments; {name} is not one of {known}")
    if config.method != "lora" and not _is_listed(optimizer, _ELEMENTWISE):
        raise ValueError(
            f"{name} is not known to update elementwise, so its gradients cannot be refactored; use AdamW or another "
            "of torch.optim's elementwise optimizers"
        )


def _check_sizes(pairs: Sequence[AdapterPair]) -> None:
    for pair in pairs:
        rows, least = min(pair.in_features, pair.out_features), pair.lora_rank
        if rows < least or rows * least < packed_size(least):
            raise ValueError(
                f"method='lora-rite' needs r orthonormal directions in each factor, and {pair.name} has r={least} with "
                f"in={pair.in_features}, out={pair.out_features}: lower r there (rank_pattern) or leave it out"
            )


def _is_listed(optimizer: torch.optim.Optimizer, listed: dict[str, set[str]]) -> bool:
    """Whether the optimizer's class, or one that it derives from, is in a list (bitsandbytes adds 8bit and Paged)."""
    for base in type(optimizer).__mro__:
        package = base.__module__.split(".")[0]
        name = base.__name__
        if package == "bitsandbytes":
            name = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
        if name in listed.get(package, ()):
            return True
    return False
