"""LoRARite: the LoRA-RITE optimizer (Yen et al., 2024, arXiv 2410.20625) for factors that are cut between ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..methods.lora_rite import LoRARiteMethod, RiteSettings
from .factor_optimizer import FactorOptimizer, is_number, require


class LoRARite(FactorOptimizer):
    """Transformation-invariant adaptive steps on LoRA factors; AdamW on every other parameter.

    Use it like any torch optimizer under any engine, then call
    ``attach(model, optimizer, RefLoRAConfig(method="lora-rite"))``, which tells it where the factors lie. Before
    ``attach``, a step raises if any gradient is not zero. A step with zero gradients only creates the state: DeepSpeed
    and torch's checkpoint functions take such a step with a new optimizer.

    State: ``step``, 0-dim float32 on the CPU; ``exp_avg`` and ``exp_avg_sq``, with the parameter's shape and placement,
    float32 (float64 for a float64 parameter). Every engine shards, offloads, saves and reshards them like Adam's.
    ``exp_avg`` is a factor's first moment. The first ``r (r + 1) / 2 + 1`` elements of a factor's ``exp_avg_sq`` are
    its second moment (upper triangle) and its escaped mass. Moments refer to the symmetric orthonormal basis of the
    current factors, and change with it.

    Differences from the published code:

    - Bases are ``X (X^T X)^(-1/2)`` instead of QR factors; the step does not depend on the choice.
    - Gram matrices are float64.
    - Singular values below 1e-6 of a factor's norm count as zero.
    - A negative eigenvalue of a second moment counts as zero instead of dropping the step.
    - A gradient that is not finite makes its pair not finite, as with AdamW.
    - An update that would leave the range of float16 factors is skipped.

    Args:
        params: as for any torch optimizer; groups may set ``lr``, ``betas`` and ``weight_decay``. A factor without a
            gradient is treated as one with a zero gradient: momentum and weight decay continue.
        lr: learning rate.
        betas: decay rates of the first and second moment, with bias correction.
        eps: number that is added to the root of the second moment.
        clip_unmagnified_grad: largest norm of all unmagnified gradients together; 0 for no clipping.
        update_capping: largest root mean square of a factor's unmagnified update; 0 for no cap.
        update_skipping: largest root mean square of an unmagnified gradient; a larger one is skipped; 0 for never.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        apply_escape: whether to add the escaped mass, which turns of the basis took, to the second moment. On a GPU
            this waits for the device.
        balance_param: whether to give both factors of a pair the same norm after each step.

    Raises:
        ValueError: a value is out of range.
    """

    method = LoRARiteMethod.name
    title = "LoRA-RITE"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        clip_unmagnified_grad: float = 1.0,
        update_capping: float = 0.0,
        update_skipping: float = 1.0,
        weight_decay: float = 0.0,
        apply_escape: bool = False,
        balance_param: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("update_capping", update_capping)):
            require(is_number(value) and value >= 0, name, value, "a finite number of at least 0")
        for name, value in (("clip_unmagnified_grad", clip_unmagnified_grad), ("update_skipping", update_skipping)):
            require(is_number(value) and value >= 0, name, value, "a finite number of at least 0 (0: off)")
        two = isinstance(betas, Sequence) and len(betas) == 2
        require(
            two and all(is_number(beta) and 0 <= beta < 1 for beta in betas), "betas", betas, "two numbers in [0, 1)"
        )
        require(is_number(eps) and eps > 0, "eps", eps, "a finite number above 0")
        for name, flag in (("apply_escape", apply_escape), ("balance_param", balance_param)):
            require(isinstance(flag, bool), name, flag, "True or False")
        self.settings = RiteSettings(
            eps=eps,
            clip_unmagnified_grad=clip_unmagnified_grad,
            update_capping=update_capping,
            update_skipping=update_skipping,
            apply_escape=apply_escape,
            balance_param=balance_param,
        )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "settings": self.settings}
