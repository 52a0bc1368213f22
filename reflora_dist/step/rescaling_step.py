"""The step of a method that rescales the factors and Adam's moments after the update."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra.tensor_lists import PerTensor
from ..collectives.communicator import Communicator
from ..engines.base import Engine, Firing
from ..methods.base import RescalingMethod
from .base import Step
from .figures import balance_figures

# Where Adam's variants keep what scales like 1 / factor, and like 1 / factor^2.
_FIRST_MOMENTS = ("exp_avg",)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
_NEEDED = {"exp_avg", "exp_avg_sq"}


class RescalingStep(Step):
    """Applies a RescalingMethod to the factors and to Adam's moments.

    Communication per call: one all-reduce of two float64 values per pair; none if ranks hold the factors whole.

    Attributes:
        squared_norms: ``[2, P]``, of lora_A and lora_B before the last rescaling; None before the first.
    """

    def __init__(self, method: RescalingMethod, engine: Engine, communicator: Communicator) -> None:
        super().__init__(engine, communicator)
        self._method = method
        self._per_tensor = PerTensor(communicator.shard_device)
        self.squared_norms: Tensor | None = None

    def before_first_step(self, *, due: bool) -> Tensor | None:
        return self._timed(in_step=False) if due else None

    def after_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        return self._timed(in_step=True) if due else None

    def figures(self) -> dict[str, float]:
        return {} if self.squared_norms is None else balance_figures(self.squared_norms)

    def _timed(self, in_step: bool) -> Tensor:
        self.stopwatch.start(new_step=True)
        skipped = self(in_step)
        self.stopwatch.stop()
        return skipped

    def __call__(self, in_step: bool) -> Tensor:
        """Rescale; ``in_step`` as in ``Engine.publish_weights``. Returns the number of pairs left as they are."""
        weights = self._engine.weights()
        squared_norms = self._per_tensor.squares(weights).to(self._comm.device)
        (squared_norms,) = self._comm.all_reduce([squared_norms])
        self.squared_norms = squared_norms.view(-1, 2).T
        rescaling = self._method.solve(self.squared_norms)
        factors = torch.stack([rescaling.factor_a, 1 / rescaling.factor_a], dim=1).flatten()
        self._scale(weights, factors)
        self._engine.publish_weights(in_step)
        return (~rescaling.solved).sum()

    def _scale(self, weights: list[Tensor], factors: Tensor) -> None:
        factors = factors.to(self._comm.shard_device)
        states = self._engine.moments()
        for state in states:
            if state and not state.keys() >= _NEEDED:
                raise RuntimeError(f"the optimizer keeps {sorted(state)}, RefLoRA-S needs exp_avg and exp_avg_sq")
        self._per_tensor.scale_("weights", weights, factors)
        inverse = factors.reciprocal()
        for keys, powers in ((_FIRST_MOMENTS, inverse), (_SECOND_MOMENTS, inverse.square())):
            for key in keys:
                moments = [state.get(key) for state in states]
                if any(moment is not None for moment in moments):  # AMSGrad's are rarely there
                    self._per_tensor.scale_(key, moments, powers)
