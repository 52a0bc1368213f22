"""The step of a method that changes gradients before the update."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from ..algebra.types import Matrices
from ..collectives.communicator import Communicator
from ..collectives.exchange import Channel
from ..collectives.grams import reduce_grams
from ..collectives.retile import Retiler
from ..engines.base import Engine, Firing
from ..methods.base import Transform
from .base import Step
from .figures import change_of_gradients, gram_figures
from .half import HalfGuard
from .moments import FIRST_MOMENT, Moments, moments_of
from .own_blocks import block_set
from .solver import Solver, count_unsolved


class GradientStep(Step):
    """Applies a GradientMethod to the gradients that an engine is about to use.

    Ranks exchange rows that are cut, sum their Gram matrices, solve for the method's r-sized matrices, multiply their
    blocks of the gradients by these, and send the rows back.

    A pair whose new gradient would leave the range of float16 is left as plain LoRA. If two firings update its factors,
    the first factor may be updated before the second gradient turns out too large: then only the second factor is left
    as plain LoRA.

    Communication per step: one all-reduce of the Gram matrices, or one per firing for a method that uses gradients; the
    solver's all-gather; two exchanges per firing if factors move; for float16 gradients one all-reduce per firing of a
    flag per pair. None if every rank holds the factors whole.

    Args:
        engine, retiler, communicator: made for the same ranks.
        solver: the solver of the method.
        uses_gradients: whether the method needs Gram matrices of ``[X, grad_X]``.
        carries_moments: whether Adam's moments of the warm-up are replaced as the gradients of the first step are.
        hopeless: numbers of the pairs for which the method does not exist; their gradients stay as they are.

    Attributes:
        grams: ``{r: [2, P_r, r, r]}`` float64, Gram matrices of the factors before the last step; empty before the
            first.
    """

    def __init__(
        self,
        engine: Engine,
        retiler: Retiler,
        communicator: Communicator,
        solver: Solver,
        uses_gradients: bool,
        carries_moments: bool,
        hopeless: Collection[int] = (),
    ) -> None:
        super().__init__(engine, communicator)
        self._retiler = retiler
        self._solver = solver
        self._uses_gradients = uses_gradients
        self._carries_moments = carries_moments
        self._blocks = block_set(engine, retiler.specs, communicator.device)
        self._everything = (True,) * (2 * len(engine.pairs))
        self._acts_on = tuple(factor // 2 not in hopeless for factor in range(2 * len(engine.pairs)))
        self._transform: Transform | None = None
        self._guard = HalfGuard(communicator) if engine.has_half_gradients() else None
        self._left: Tensor | None = None  # ``[P]`` bool, pairs that the guard has restored in this step
        self._solved: dict[int, Tensor] = {}
        by_rank = self._blocks.pairs_by_rank if self._guard is not None else {}
        self._pairs = {r: torch.tensor(pairs, device=communicator.device) for r, pairs in by_rank.items()}
        self.grams: Matrices = {}
        self._change: Tensor | None = None  # of the last step that was watched, see change_of_gradients
        self._scalings = [pair.scaling for pair in engine.pairs] if uses_gradients else []

    def before_update(self, firing: Firing, *, due: bool, begins: bool) -> Tensor | None:
        if self._scalings and self._scalings != [pair.scaling for pair in self._engine.pairs]:
            raise RuntimeError("the adapters' scaling changed after attach(): detach, then attach again")
        if not due:
            return None
        self.stopwatch.start(new_step=firing.first)
        skipped = self(firing, moments_of(self._engine) if begins and self._carries_moments else {})
        self.stopwatch.stop()
        return skipped

    def figures(self) -> dict[str, float]:
        if not self.grams:
            return {}
        figures = gram_figures(self.grams)
        if self._change is not None:
            gradients, changed = self._change.tolist()
            if 0 < gradients < math.inf and changed < math.inf:
                figures["gradient_change"] = math.sqrt(max(0.0, changed) / gradients)
        return figures

    def _watch(self, firing: Firing, grams: Matrices, matrices: Matrices) -> None:
        """Keep how much this firing changes the gradients."""
        change = change_of_gradients(grams, matrices)
        self._change = change if firing.first or self._change is None else self._change + change
        self.watched = self.watched and not firing.last

    def __call__(self, firing: Firing, moments: Moments) -> Tensor | None:
        """Replace the gradients of this firing, and moments likewise.

        Returns:
            The number of pairs left as plain LoRA, a 0-dim tensor, in one firing of each step; None in the others.
        """
        if not all(self._acts_on):
            present = tuple(p and acts for p, acts in zip(firing.present, self._acts_on, strict=True))
            firing = firing._replace(present=present)
        if self._guard is None:
            transform = self._act(firing, moments)
            return count_unsolved(transform.solved) if firing.first else None
        changed = [self._engine.gradients(), *moments.values()]
        self._guard.keep([[x if p else None for x, p in zip(of, firing.present, strict=True)] for of in changed])
        transform = self._act(firing, moments)
        self._left = left = self._guard.restore(None if firing.first else self._left)
        if firing.first:
            self._solved = transform.solved
        if not firing.last:
            return None
        return count_unsolved({r: flags & ~left.index_select(0, self._pairs[r]) for r, flags in self._solved.items()})

    def _act(self, firing: Firing, moments: Moments) -> Transform:
        return self._with_gradients(firing) if self._uses_gradients else self._with_weights(firing, moments)

    def _with_weights(self, firing: Firing, moments: Moments) -> Transform:
        channels: list[Channel] = [self._engine.gradients(), *moments.values()]
        present = [firing.present] * len(channels)
        if firing.first:
            self.grams = {}  # frees the old ones before new ones are made
            # Only in the first firing are all weights those before the step, so S is formed here for all firings.
            weights: Channel = self._engine.weights()
            of_weights, *streams = self._retiler.to_blocks([weights, *channels], [self._everything, *present])
            self.grams = reduce_grams(self._blocks.grams(of_weights), self._comm)
            self._transform = self._solver(self.grams)
        else:
            streams = self._retiler.to_blocks(channels, present)
        transform = self._transform
        assert transform is not None
        if self.watched:
            self._watch(firing, self._blocks.grams(streams[0]), transform.matrices)
        squares = {r: both.square() for r, both in transform.matrices.items()} if moments else {}
        for key, stream in zip(("gradient", *moments), streams, strict=True):
            self._blocks.multiply_(stream, transform.matrices if key in ("gradient", FIRST_MOMENT) else squares)
        self._retiler.from_blocks(streams, channels, present)
        if firing.last:
            self._transform = None
        return transform

    def _with_gradients(self, firing: Firing) -> Transform:
        weights, gradients = self._engine.weights(), self._engine.gradients()
        # An earlier firing may have updated the pair's other factor, so its Gram matrix before the step is kept.
        present = self._everything if firing.first else firing.present
        streams = self._retiler.to_blocks([weights, gradients], [present, firing.present])
        grams = reduce_grams(self._blocks.stacked_grams(streams), self._comm)
        if firing.first:
            self.grams = {r: both[..., :r, :r].clone() for r, both in grams.items()}
        for r, both in grams.items():
            both[..., :r, :r] = self.grams[r]
        transform = self._solver(grams)
        if self.watched:
            self._watch(firing, grams, transform.matrices)
        self._blocks.combine_(streams, [1], transform.matrices)
        self._retiler.from_blocks(streams[1:], [gradients], [firing.present])
        return transform
