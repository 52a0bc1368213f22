"""LoRARite: the LoRA-RITE optimizer (Yen et al., 2024, arXiv 2410.20625) for factors that are cut between ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..methods.lora_rite import RiteSettings

_ADAMW_EPS = 1e-8


class FactorUpdate(Protocol):
    """The update of the factors by all ranks together, which ``attach`` gives the optimizer."""

    def __call__(self) -> None: ...

    def others(self, parameter: Tensor) -> list[tuple[int, int]]:
        """Return the stretches ``(start, stop)`` of an optimizer's parameter that belong to no factor."""

    def holds_no_factor(self, parameter: Tensor) -> bool:
        """Return whether an optimizer's parameter holds no part of a factor, on any rank."""


class LoRARite(torch.optim.Optimizer):
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
            _require(_is_number(value) and value >= 0, name, value, "a finite number of at least 0")
        for name, value in (("clip_unmagnified_grad", clip_unmagnified_grad), ("update_skipping", update_skipping)):
            _require(_is_number(value) and value >= 0, name, value, "a finite number of at least 0 (0: off)")
        two = isinstance(betas, Sequence) and len(betas) == 2
        _require(
            two and all(_is_number(beta) and 0 <= beta < 1 for beta in betas), "betas", betas, "two numbers in [0, 1)"
        )
        _require(_is_number(eps) and eps > 0, "eps", eps, "a finite number above 0")
        for name, flag in (("apply_escape", apply_escape), ("balance_param", balance_param)):
            _require(isinstance(flag, bool), name, flag, "True or False")
        self.settings = RiteSettings(
            eps=eps,
            clip_unmagnified_grad=clip_unmagnified_grad,
            update_capping=update_capping,
            update_skipping=update_skipping,
            apply_escape=apply_escape,
            balance_param=balance_param,
        )
        self._update: FactorUpdate | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the attached update: copies and pickles are not attached."""
        return {**super().__getstate__(), "settings": self.settings, "_update": None}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or one firing of an engine that splits its step.

        Args:
            closure: recomputes the loss; refused once the optimizer is attached.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is not zero and the optimizer is not attached.

        Communication: that of ``RiteStep``; every rank must call.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._update is None:
            self._refuse_gradients()
        self.create_state()  # under ZeRO-3 the groups hold parameters during the step only
        if self._update is None:
            return loss
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step_others(parameter, group)
        self._update()
        return loss

    def connect(self, update: FactorUpdate | None) -> None:
        """Set the update of the factors, or None to remove it. Called by ``attach`` and ``Handle.detach``."""
        self._update = update
        if update is not None:
            self.create_state()

    def create_state(self) -> None:
        """Create zero moments for every parameter that has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    dtype = _state_dtype(parameter)
                    state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = torch.zeros_like(parameter, dtype=dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, but keep float32 moments for 16-bit parameters."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            state = self.state.get(parameter, {})  # get() adds no entry: engines may still replace the parameter
            if "step" in state:  # kept on the host, so that reading it does not wait for a GPU
                state["step"] = state["step"].cpu()
            for key in ("exp_avg", "exp_avg_sq"):
                if key in saved.get(index, {}):
                    state[key] = saved[index][key].to(parameter.device, _state_dtype(parameter)).clone()

    def _refuse_gradients(self) -> None:
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        if any(gradient is not None and bool(_local(gradient).any()) for gradient in gradients):
            raise RuntimeError(
                "LoRARite.step() before attach(): call attach(model, optimizer, RefLoRAConfig(method='lora-rite')) "
                "after wrapping, or use RefLoRACallback in HF Trainer"
            )

    def _step_others(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert self._update is not None
        state = self.state[parameter]
        stretches = self._update.others(parameter)
        if parameter.grad is None and self._update.holds_no_factor(parameter):
            return  # AdamW, too, counts only steps with a gradient
        if stretches and parameter.grad is not None:
            tensors = [parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
            held, gradients, first, second = (_parts(_local(tensor), stretches) for tensor in tensors)
            # moments of 16-bit parameters are float32, and AdamW needs one dtype
            wide = first[0].dtype
            weights = [part.to(wide) for part in held]
            gradients = [part.to(wide) for part in gradients]
            steps = [state["step"].clone() for _ in stretches]
            beta1, beta2 = group["betas"]
            adamw(
                weights, gradients, first, second, [], steps, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                weight_decay=group["weight_decay"], eps=_ADAMW_EPS, maximize=False,
            )  # fmt: skip
            for part, weight in zip(held, weights, strict=True):
                if part is not weight:
                    part.copy_(weight)
        state["step"] += 1


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):  # a learning rate on the device: reading it would wait
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _require(fulfilled: bool, name: str, value: object, condition: str) -> None:
    if not fulfilled:
        raise ValueError(f"{name}={value!r} must be {condition}")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parts(tensor: Tensor, stretches: list[tuple[int, int]]) -> list[Tensor]:
    """Return views of the stretches, or the tensor itself, contiguous or not, if one stretch covers all of it."""
    if stretches == [(0, tensor.numel())]:
        return [tensor]
    return [tensor.view(-1)[start:stop] for start, stop in stretches]


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
