"""LoRAMuon: the LoRA-Muon optimizer (Cesista et al., 2026, arXiv 2606.12921) for factors that are cut between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..methods.lora_muon import LoRAMuonMethod
from .factor_optimizer import FactorOptimizer, is_number, require


class LoRAMuon(FactorOptimizer):
    """Steps of a given spectral norm on the product of LoRA factors; AdamW on every other parameter.

    Use it like any torch optimizer under any engine, then call
    ``attach(model, optimizer, RefLoRAConfig(method="lora-muon"))``, which tells it where the factors lie. Before
    ``attach``, a step raises if any gradient is not zero. A step with zero gradients only creates the state: DeepSpeed
    and torch's checkpoint functions take such a step with a new optimizer.

    State: ``step``, 0-dim float32 on the CPU; ``exp_avg`` and ``exp_avg_sq``, with the parameter's shape and placement,
    float32 (float64 for a float64 parameter). ``exp_avg`` is a factor's moment. A factor has no second moment: its
    ``exp_avg_sq`` is zero, and there because flat buffers hold factors beside other parameters, and because engines'
    checkpoints expect Adam's tensors.

    Choices beside the published formula:

    - W is the layer's update ``s B A``, with s from alpha and r. So the learning rate is the spectral norm of its
      change, half of it from each factor, for every alpha.
    - Inverse roots and matrix signs are exact and float64 in place of damped polynomials.
    - Singular values below 1e-6 of a matrix's norm count as zero. The other directions keep their step. Where
      ``B = 0``, lora_A therefore waits for a step. Such pairs are counted as skipped.
    - A gradient that is not finite makes its pair not finite, as with AdamW.
    - An update that would leave the range of float16 factors is skipped.

    Args:
        params: as for any torch optimizer; groups may set ``lr``, ``momentum``, ``weight_decay`` and ``betas``. A
            factor without a gradient is treated as one with a zero gradient: momentum and weight decay continue.
        lr: learning rate.
        momentum: decay rate of a factor's moment, ``m <- momentum m + (1 - momentum) grad``.
        weight_decay: decay of the product, multiplied by the learning rate; of other parameters AdamW's.
        betas: AdamW's decay rates, for parameters that are no factors.

    Raises:
        ValueError: a value is out of range.
    """

    method = LoRAMuonMethod.name
    title = "LoRA-Muon"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch does, after a check of its values.

        Raises:
            ValueError: a value is out of range.
        """
        values = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            value = values[name]
            require(is_number(value) and value >= 0, name, value, "a finite number of at least 0")
        momentum, betas = values["momentum"], values["betas"]
        require(_is_rate(momentum), "momentum", momentum, "a number in [0, 1)")
        two = isinstance(betas, Sequence) and len(betas) == 2
        require(two and all(map(_is_rate, betas)), "betas", betas, "two numbers in [0, 1)")
        decay_of(values["lr"], values["weight_decay"])
        super().add_param_group(param_group)


def _is_rate(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def decay_of(lr: Any, weight_decay: Any) -> float:
    """Return ``sqrt(1 - lr * weight_decay)``, by which a step multiplies a factor.

    Raises:
        ValueError: ``lr * weight_decay`` is not below 1.
    """
    product = float(lr) * float(weight_decay)
    if not product < 1:
        raise ValueError(
            f"weight_decay={weight_decay!r} with lr={lr!r}: LoRA-Muon multiplies factors by "
            "sqrt(1 - lr * weight_decay), so their product must be below 1"
        )
    return (1 - product) ** 0.5
