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
from .half import HalfGuard

# State keys of Adam's variants: first moments scale like 1 / factor, second moments like 1 / factor^2.
_FIRST_MOMENTS = ("exp_avg",)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
_NEEDED = {"exp_avg", "exp_avg_sq"}


class RescalingStep(Step):
    """Applies a RescalingMethod to the factors and to Adam's moments.

    A pair whose new factors or moments would leave the range of float16 stays as it is.

    Communication per call: one all-reduce of two float64 values per pair; for float16 factors one more of a flag per
    pair; none if every rank holds the factors whole.

    Attributes:
        squared_norms: ``[2, P]`` float64, of lora_A and lora_B before the last rescaling; None before the first.
    """

    def __init__(self, method: RescalingMethod, engine: Engine, communicator: Communicator) -> None:
        super().__init__(engine, communicator)
        self._method = method
        self._per_tensor = PerTensor(communicator.shard_device)
        self._guard = HalfGuard(communicator) if engine.has_half_gradients() else None
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
        """Rescale the factors and moments. Every rank must call.

        Args:
            in_step: as in ``Engine.publish_weights``.

        Returns:
            The number of pairs left as they are, a 0-dim int64 tensor.
        """
        weights = self._engine.weights()
        squared_norms = self._per_tensor.squares(weights).to(self._comm.device)
        (squared_norms,) = self._comm.all_reduce([squared_norms])
        self.squared_norms = squared_norms.view(-1, 2).T
        rescaling = self._method.solve(self.squared_norms)
        factors = torch.stack([rescaling.factor_a, 1 / rescaling.factor_a], dim=1).flatten()
        moments, solved = self._moments(), rescaling.solved
        if self._guard is not None:
            self._guard.keep([weights, *moments.values()])
        self._scale(weights, moments, factors.to(self._comm.shard_device))
        if self._guard is not None:
            solved = solved & ~self._guard.restore()
        self._engine.publish_weights(in_step)
        return (~solved).sum()

    def _moments(self) -> dict[str, list[Tensor | None]]:
        """Return the existing moments by name: none before the first step, ``max_exp_avg_sq`` with AMSGrad only."""
        states = self._engine.moments()
        for state in states:
            if state and not state.keys() >= _NEEDED:
                raise RuntimeError(f"the optimizer keeps {sorted(state)}, RefLoRA-S needs exp_avg and exp_avg_sq")
        moments = {key: [state.get(key) for state in states] for key in (*_FIRST_MOMENTS, *_SECOND_MOMENTS)}
        return {key: of_key for key, of_key in moments.items() if any(moment is not None for moment in of_key)}

    def _scale(self, weights: list[Tensor], moments: dict[str, list[Tensor | None]], factors: Tensor) -> None:
        self._per_tensor.scale_("weights", weights, factors)
        inverse = factors.reciprocal()
        for key, of_key in moments.items():
            self._per_tensor.scale_(key, of_key, inverse if key in _FIRST_MOMENTS else inverse.square())
