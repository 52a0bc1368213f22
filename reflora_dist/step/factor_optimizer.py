"""The base of optimizers that update the two factors of a pair together, for factors that are cut between ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

_ADAMW_EPS = 1e-8


class FactorUpdate(Protocol):
    """The update of the factors by all ranks together, which ``attach`` gives the optimizer."""

    def __call__(self) -> None: ...

    def others(self, parameter: Tensor) -> list[tuple[int, int]]:
        """Return the stretches ``(start, stop)`` of an optimizer's parameter that belong to no factor."""

    def holds_no_factor(self, parameter: Tensor) -> bool:
        """Return whether an optimizer's parameter holds no part of a factor, on any rank."""


class FactorOptimizer(torch.optim.Optimizer):
    """An optimizer whose update of the factors is set by ``attach``; every other parameter gets AdamW.

    Before ``attach``, a step raises if any gradient is not zero. A step with zero gradients only creates the state:
    DeepSpeed and torch's checkpoint functions take such a step with a new optimizer.

    State: ``step``, 0-dim float32 on the CPU; ``exp_avg`` and ``exp_avg_sq``, with the parameter's shape and placement,
    float32 (float64 for a float64 parameter). Every engine shards, offloads, saves and reshards them like Adam's.
    Groups have ``lr``, ``weight_decay`` and ``betas``, which AdamW reads. A derived class may add other keys.

    Attributes:
        method: name of the method in ``RefLoRAConfig``.
        title: name of the method in messages.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    _update: FactorUpdate | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the attached update: copies and pickles are not attached."""
        return {**super().__getstate__(), "_update": None}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or one firing of an engine that splits its step.

        Args:
            closure: recomputes the loss; refused once the optimizer is attached.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is not zero and the optimizer is not attached.

        Communication: that of the attached step; every rank must call.
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
                f"{type(self).__name__}.step() before attach(): call attach(model, optimizer, "
                f"RefLoRAConfig(method={self.method!r})) after wrapping, or use RefLoRACallback in HF Trainer"
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


def is_number(value: object) -> bool:
    """Return whether an option is a finite number, or a tensor of one."""
    if isinstance(value, Tensor):  # a learning rate on the device: reading it would wait
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require(fulfilled: bool, name: str, value: object, condition: str) -> None:
    """Refuse an option's value.

    Raises:
        ValueError: the condition is not fulfilled.
    """
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
