"""The base of the steps of optimizers that update both factors of a pair, computed by all ranks together."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ..algebra.types import Matrices
from ..collectives.communicator import Communicator
from ..collectives.ranks import raise_on_all_ranks
from ..collectives.retile import Retiler
from ..engines.base import Engine, Firing
from .base import Step
from .factor_optimizer import FactorOptimizer
from .figures import gram_figures
from .half import HalfGuard
from .own_blocks import block_set


class OptimizerStep(Step, abc.ABC):
    """The step of a FactorOptimizer: it updates the factors and their moments in the last firing.

    A pair whose new factors would leave the range of float16 keeps its factors and its moments.

    Args:
        optimizer: the optimizer with its hyperparameters and state.
        engine: the engine of that optimizer.
        retiler, communicator: made for the engine's group.

    Attributes:
        grams: ``{r: [2, P_r, r, r]}`` float64, Gram matrices of the factors before the last step; empty before the
            first.
    """

    def __init__(
        self,
        optimizer: FactorOptimizer,
        engine: Engine,
        retiler: Retiler,
        communicator: Communicator,
    ) -> None:
        super().__init__(engine, communicator)
        self._optimizer = optimizer
        self._retiler = retiler
        self._blocks = block_set(engine, retiler.specs, communicator.device)
        self._everything = (True,) * (2 * len(engine.pairs))
        device = communicator.device  # indexing with a list would make every step wait for the device
        self._pairs = {r: torch.tensor(pairs, device=device) for r, pairs in self._blocks.pairs_by_rank.items()}
        self._free_runs: dict[int, list[tuple[int, int]]] = {}
        self._held: dict[int, Tensor | None] = {}  # gradients of earlier firings of this step
        self._groups: dict[int, tuple[float, ...]] = {}  # settings of the factors in this step's firings so far
        self._skipped = torch.zeros((), dtype=torch.int64, device=communicator.device)
        self._guard = HalfGuard(communicator) if engine.has_half_gradients() else None
        self.grams: Matrices = {}

    @classmethod
    def connected(cls, engine: Engine, retiler: Retiler, communicator: Communicator) -> Self:
        """Make a step and register it with the engine's optimizer.

        Raises:
            ValueError: on every rank; the optimizer's state is that of another optimizer.

        Communication: one all-gather of small objects; every rank must call.
        """
        assert isinstance(engine.optimizer, FactorOptimizer)
        step = cls(engine.optimizer, engine, retiler, communicator)
        with raise_on_all_ranks("reading the optimizer's state"):
            step.refuse_foreign_state()
        engine.optimizer.connect(step)
        return step

    @abc.abstractmethod
    def _settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the numbers that :meth:`_update` needs of a factor's group, and of its state."""

    @abc.abstractmethod
    def _update(self, gradients: list[Tensor | None]) -> dict[int, Tensor]:
        """Update every factor and its moments.

        Args:
            gradients: this rank's piece of every factor's gradient; None counts as zeros.

        Returns:
            ``{r: [P_r]}`` bool; True for a pair that the method could not update in full.

        Communication: one all-reduce, and two exchanges if factors move. Every rank must call.
        """

    def before_update(self, firing: Firing, *, due: bool, begins: bool) -> Tensor | None:
        self.stopwatch.start(new_step=firing.first)  # the method's work is the update itself
        return None

    def after_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        self.stopwatch.stop()
        return self._take_skipped() if firing.last else None

    def figures(self) -> dict[str, float]:
        return gram_figures(self.grams) if self.grams else {}

    def close(self) -> None:
        self._optimizer.connect(None)

    def refuse_foreign_state(self) -> None:
        """Refuse moments of another optimizer. Local, no communication.

        Raises:
            ValueError: a second moment is not zero beyond the elements that the method uses, so another optimizer
                wrote it.
        """
        heads = self._heads()
        for factor, state in enumerate(self._engine.moments()):
            second = state.get("exp_avg_sq")
            if second is None:
                continue
            own = sum(int(second.view(-1)[part].count_nonzero()) for part in heads.get(factor, []))
            if int(second.count_nonzero()) > own:
                raise ValueError(
                    "the optimizer's state is that of another optimizer (AdamW keeps moments of the same names): start "
                    f"{type(self._optimizer).__name__} without it, or continue with the optimizer that wrote it"
                )

    def _heads(self) -> dict[int, list[slice]]:
        """Return, by factor, the slices of this rank's piece of ``exp_avg_sq`` that the method uses."""
        return {}

    def others(self, parameter: Tensor) -> list[tuple[int, int]]:
        """See :class:`reflora_dist.step.factor_optimizer.FactorUpdate`."""
        if not self._free_runs:
            self._free_runs = _free_runs(self._engine)
        numel = _local_numel(parameter)
        return self._free_runs.get(id(parameter), [(0, numel)] if numel else [])

    def holds_no_factor(self, parameter: Tensor) -> bool:
        """See :class:`reflora_dist.step.factor_optimizer.FactorUpdate`."""
        self.others(parameter)  # its first call looks up the parameters that hold factors
        return id(parameter) not in self._free_runs

    def __call__(self) -> None:
        """Keep this firing's gradients; in the last firing of the step update every factor."""
        firing = self._engine.firing()
        if firing.first:
            self._held, self._groups = {}, {}
        gradients = self._engine.gradients()
        self._read_groups(firing.present)
        if not firing.last:  # the engine frees these gradients before the last firing
            for factor, present in enumerate(firing.present):
                if present:
                    gradient = gradients[factor]
                    self._held[factor] = None if gradient is None else gradient.clone()
            return
        for factor, gradient in self._held.items():
            gradients[factor] = gradient
        self._held = {}
        skipped = self._update(gradients)
        self._skipped += torch.stack([flags.sum() for flags in skipped.values()]).sum()
        if not firing.first:
            self._engine.publish_weights(in_step=True)

    def _take_skipped(self) -> Tensor:
        """Return how many pairs were skipped since the last call; 0-dim int64."""
        skipped, self._skipped = self._skipped, torch.zeros_like(self._skipped)
        return skipped

    def _guarded(self, skipped: dict[int, Tensor], *grams: Matrices) -> dict[int, Tensor]:
        """Restore the pairs that left the range of float16, and return ``skipped`` with these too.

        Pairs that were not finite before the step stay so, as with AdamW.

        Args:
            skipped: ``{r: [P_r]}`` bool.
            grams: ``{r: [2, P_r, k r, k r]}``, not finite for pairs that were not finite before the step.
        """
        if self._guard is None:
            return skipped
        broken = torch.zeros(len(self._engine.pairs), dtype=torch.int64, device=self._comm.device)
        for of_one in grams:
            for r, both in of_one.items():
                flags = ~torch.isfinite(both).flatten(2).all(dim=2).all(dim=0)
                broken.index_add_(0, self._pairs[r], flags.to(broken.dtype))  # several experts may be broken
        left = self._guard.restore(never=broken > 0)
        return {r: flags | left.index_select(0, self._pairs[r]) for r, flags in skipped.items()}

    def _read_groups(self, present: Sequence[bool]) -> None:
        group_of = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for factor, (parameter, _) in enumerate(self._engine.holders()):
            if present[factor]:
                self._groups[factor] = self._settings(group_of[id(parameter)], self._optimizer.state[parameter])

    def _per_factor(self, values: Sequence[float]) -> Matrices:
        """``{r: [2, P_r]}`` from one value per factor."""
        both = torch.tensor(values, dtype=torch.float64).view(-1, 2).T
        return {
            r: both[:, pairs].to(self._comm.device, non_blocking=True)
            for r, pairs in self._blocks.pairs_by_rank.items()
        }


def _free_runs(engine: Engine) -> dict[int, list[tuple[int, int]]]:
    """Return the stretches ``(start, stop)`` without a factor, for each parameter that holds one, by its id."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    sizes: dict[int, int] = {}
    for (parameter, start), weight in zip(engine.holders(), engine.weights(), strict=True):
        pieces.setdefault(id(parameter), []).append((start, start + weight.numel()))
        sizes[id(parameter)] = _local_numel(parameter)
    free_runs = {}
    for key, taken in pieces.items():
        position, free = 0, []
        for start, stop in sorted(taken):
            if start > position:
                free.append((position, start))
            position = max(position, stop)
        if sizes[key] > position:
            free.append((position, sizes[key]))
        free_runs[key] = free
    return free_runs


def _local_numel(parameter: Tensor) -> int:
    to_local = getattr(parameter, "to_local", None)
    return (to_local() if to_local is not None else parameter).numel()
