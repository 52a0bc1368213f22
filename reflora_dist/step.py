"""One optimizer step: gradients refactored before the update, or factors rescaled after it."""

from __future__ import annotations

import torch
from torch import Tensor

from .ahead import Ahead
from .blocks import BlockSet, Matrices
from .communication import Communicator
from .engines import Engine, Firing
from .grams import reduce_grams
from .methods import GradientMethod, RescalingMethod
from .per_tensor import PerTensor
from .retile import Retiler
from .solving import AtOwners, Everywhere, Solution

# Where Adam's variants keep what scales like 1 / factor, and like 1 / factor^2.
_FIRST_MOMENTS = ("exp_avg",)
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
_NEEDED = {"exp_avg", "exp_avg_sq"}


class GradientStep:
    """Applies a GradientMethod to the gradients that an engine is about to use.

    Communication per step: if factors are cut two all-to-alls per firing, otherwise one all-reduce of the Grams; for a
    method that uses gradients both, the all-reduce once per firing. None if every rank holds the factors whole. Formed
    ahead, the solution takes two all-to-alls, or the all-reduce, of its own.

    Args:
        retiler: with messages of ``message_values`` if ``method`` does not use gradients.
        ahead: forms S ahead; None to form it in the step.

    Attributes:
        grams: ``{r: [2, P_r, r, r]}``, of the factors before the last step; empty before the first.
    """

    def __init__(
        self,
        method: GradientMethod,
        engine: Engine,
        retiler: Retiler,
        communicator: Communicator,
        ahead: Communicator | None = None,
    ) -> None:
        self._method = method
        self._engine = engine
        self._retiler = retiler
        self._comm = communicator
        lora_ranks = [pair.lora_rank for pair in engine.pairs]
        self._solver: Everywhere | AtOwners
        if method.uses_gradients:
            self._blocks = BlockSet(retiler.specs, lora_ranks, communicator.device)
        elif retiler.cut:
            self._solver = AtOwners(method, retiler, lora_ranks, communicator)
        else:
            self._solver = Everywhere(method, retiler, lora_ranks, communicator.device)
        self._everything = (True,) * (2 * len(engine.pairs))
        self._solution: Solution | None = None
        self.grams: Matrices = {}
        self._ahead = Ahead(ahead) if ahead is not None else None

    def __call__(self, firing: Firing) -> Tensor | None:
        """Replace the gradients of this firing.

        Returns:
            The number of pairs left as plain LoRA, a 0-dim tensor, on the first firing of a step; then None.
        """
        if self._method.uses_gradients:
            return self._with_gradients(firing)
        gradients = self._engine.gradients()
        skipped = None
        if firing.first:
            self.grams = {}  # not kept beside new ones
            # The weights of all sub-groups are still those of before the step only now, so S is formed once.
            weights = self._engine.weights()
            solution = self._ahead.take(weights, self._engine.versions()) if self._ahead is not None else None
            if solution is None:
                solution = self._solver.solve_and_apply(weights, gradients, firing.present, self._comm)
            else:
                self._solver.apply(solution, gradients, firing.present)
            self._solution = solution
            self.grams = solution.grams
            skipped = _count_unsolved(solution.whole.solved)
        else:
            assert self._solution is not None
            self._solver.apply(self._solution, gradients, firing.present)
        if firing.last:
            self._solution = None
        return skipped

    def _with_gradients(self, firing: Firing) -> Tensor | None:
        weights, gradients = self._engine.weights(), self._engine.gradients()
        # the other side's factor may have been updated by an earlier firing; its Gram of before the step is kept
        present = self._everything if firing.first else firing.present
        streams = self._retiler.to_blocks([weights, gradients], [present, firing.present])
        grams = reduce_grams(self._blocks.stacked_grams(streams), self._comm)
        if firing.first:
            self.grams = {r: both[..., :r, :r].clone() for r, both in grams.items()}
        for r, both in grams.items():
            both[..., :r, :r] = self.grams[r]
        transform = self._method.solve(grams)
        self._blocks.combine_(streams, [1], transform.matrices)
        self._retiler.from_blocks(streams[1:], [gradients], [firing.present])
        return _count_unsolved(transform.solved) if firing.first else None

    def form_ahead(self) -> None:
        """Right after an update: form the next step's S, on a GPU beside the forward that follows."""
        if self._ahead is not None:
            weights = self._engine.weights()
            with self._ahead.forming(weights, self._engine.versions()) as communicator:
                self._ahead.keep(self._solver.solve(weights, communicator))

    def drop(self) -> None:
        """Forget what was formed ahead: the weights have changed. Every rank must call."""
        if self._ahead is not None:
            self._ahead.drop()

    def close(self) -> None:
        """Take part in no further step. Every rank must call."""
        if self._ahead is not None:
            self._ahead.close()

    @property
    def communicators(self) -> list[Communicator]:
        return [self._comm] if self._ahead is None else [self._comm, self._ahead.communicator]

    def check(self) -> None:
        """Make sure that no S that was formed ahead met weights changed unseen.

        Raises:
            RuntimeError: one did.
        """
        if self._ahead is not None:
            self._ahead.check()


class RescalingStep:
    """Applies a RescalingMethod to the factors and to Adam's moments.

    Communication per call: one all-reduce of two float64 values per pair; none if ranks hold the factors whole.

    Attributes:
        squared_norms: ``[2, P]``, of lora_A and lora_B before the last rescaling; None before the first.
    """

    def __init__(self, method: RescalingMethod, engine: Engine, communicator: Communicator) -> None:
        self._method = method
        self._engine = engine
        self._comm = communicator
        self._per_tensor = PerTensor(communicator.shard_device)
        self.squared_norms: Tensor | None = None

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


def _count_unsolved(solved: dict[int, Tensor]) -> Tensor:
    first, *others = [(~flags).sum() for flags in solved.values()]
    return sum(others, first)
