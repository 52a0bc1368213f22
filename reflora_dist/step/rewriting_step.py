"""The steps of methods that rewrite the factors after the update: by a scalar each, or by an r x r matrix each."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.tensor_lists import PerTensor
from ..algebra.types import Matrices
from ..collectives.communicator import Communicator
from ..collectives.exchange import Channel
from ..collectives.expert_views import ExpertViews
from ..collectives.grams import reduce_grams
from ..collectives.retile import Retiler
from ..engines.base import Engine, Firing
from ..engines.pairs import by_expert, numbers_by_expert
from ..methods.base import RescalingMethod
from .base import Step
from .figures import balance_after, balance_figures, gram_figures
from .half import HalfGuard
from .moments import FIRST_MOMENT, Moments, moments_of
from .own_blocks import block_set
from .solver import Solver


class RewritingStep(Step, abc.ABC):
    """Replaces factors by others with the same product and, if the method carries them along, Adam's moments to match.

    A pair whose new factors or moments would leave the range of float16 stays as it is.

    Communication per call: that of :meth:`_rewrite`; for float16 factors one all-reduce more of a flag per pair; none
    if every rank holds the factors whole.

    Args:
        engine: the engine whose optimizer is stepped.
        communicator: made for the engine's group.
        carries_moments: whether Adam's moments are rewritten too.
    """

    def __init__(self, engine: Engine, communicator: Communicator, carries_moments: bool) -> None:
        super().__init__(engine, communicator)
        self._carries_moments = carries_moments
        self._guard = HalfGuard(communicator) if engine.has_half_gradients() else None
        self._adapters = torch.tensor(numbers_by_expert(engine.pairs), device=communicator.device)  # of every pair

    @abc.abstractmethod
    def _rewrite(self, weights: list[Tensor], moments: Moments) -> Tensor:
        """Rewrite local pieces in place.

        Returns:
            ``[P]`` bool, False for a pair that has no solution and stays; an adapter of E experts has E pairs.
        """

    def before_first_step(self, *, due: bool) -> Tensor | None:
        return self._timed(in_step=False) if due else None

    def after_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        return self._timed(in_step=True) if due else None

    def _timed(self, in_step: bool) -> Tensor:
        self.stopwatch.start(new_step=True)
        skipped = self(in_step)
        self.stopwatch.stop()
        return skipped

    def __call__(self, in_step: bool) -> Tensor:
        """Rewrite the factors and moments. Every rank must call.

        Args:
            in_step: as in ``Engine.publish_weights``.

        Returns:
            The number of pairs left as they are, a 0-dim int64 tensor.
        """
        weights = self._engine.weights()
        # before the first step of a new run no rank has moments
        moments = moments_of(self._engine) if self._carries_moments and in_step else {}
        if self._guard is not None:
            self._guard.keep([weights, *moments.values()])
        solved = self._rewrite(weights, moments)
        if self._guard is not None:
            solved = solved & ~self._guard.restore().index_select(0, self._adapters)
        self._engine.publish_weights(in_step)
        return (~solved).sum()


class RescalingStep(RewritingStep):
    """Applies a RescalingMethod to the factors and to Adam's moments.

    Communication per call: one all-reduce of two float64 values per pair.

    Attributes:
        squared_norms: ``[2, P]`` float64, of lora_A and lora_B before the last rescaling; None before the first.
    """

    def __init__(self, method: RescalingMethod, engine: Engine, communicator: Communicator) -> None:
        super().__init__(engine, communicator, carries_moments=True)
        self._method = method
        self._per_tensor = PerTensor(communicator.shard_device)
        self._experts = ExpertViews(engine.layouts(), communicator.rank, communicator.shard_device)
        self.squared_norms: Tensor | None = None
        self._factors: Tensor | None = None  # ``[2, P]``, by which the factors were multiplied

    def figures(self) -> dict[str, float]:
        if self.squared_norms is None or self._factors is None:
            return {}
        return balance_figures(self.squared_norms) | balance_after(self.squared_norms * self._factors.square())

    def _rewrite(self, weights: list[Tensor], moments: Moments) -> Tensor:
        squared_norms = self._squares(weights).to(self._comm.device)
        (squared_norms,) = self._comm.all_reduce([squared_norms])
        self.squared_norms = squared_norms.view(-1, 2).T
        rescaling = self._method.solve(self.squared_norms)
        self._factors = torch.stack([rescaling.factor_a, 1 / rescaling.factor_a])
        factors = self._factors.T.flatten()
        factors = factors.to(self._comm.shard_device)
        self._scale("weights", weights, factors)
        inverse = factors.reciprocal()
        for key, of_key in moments.items():
            self._scale(key, of_key, inverse if key == FIRST_MOMENT else inverse.square())
        return rescaling.solved

    def _squares(self, weights: list[Tensor]) -> Tensor:
        """Return the sum of squares of this rank's elements of every factor, ``[2 P]`` float64."""
        owners = self._experts.owners
        if owners is None:
            return self._per_tensor.squares(weights)
        views = [view for view in self._experts.of(weights) if view is not None]
        squares = self._per_tensor.squares(views)
        return squares.new_zeros(2 * self._experts.num_pairs).index_add_(0, owners, squares)

    def _scale(self, name: str, tensors: Sequence[Tensor | None], factors: Tensor) -> None:
        owners = self._experts.owners
        scales = factors if owners is None else factors.index_select(0, owners)
        self._per_tensor.scale_(name, self._experts.of(tensors), scales)


class FactorStep(RewritingStep):
    """Applies a FactorMethod to the factors and, if it carries them along, to Adam's moments.

    Communication per call: one all-reduce of the Gram matrices, the solver's all-gather, and two exchanges if factors
    move.

    Args:
        engine, retiler, communicator: made for the same ranks.
        solver: the solver of the method.
        carries_moments: whether Adam's moments are rewritten too.

    Attributes:
        grams: ``{r: [2, P_r, r, r]}`` float64, Gram matrices of the factors before they were last rewritten; empty
            before the first time.
    """

    def __init__(
        self, engine: Engine, retiler: Retiler, communicator: Communicator, solver: Solver, carries_moments: bool
    ) -> None:
        super().__init__(engine, communicator, carries_moments)
        self._retiler = retiler
        self._solver = solver
        self._blocks = block_set(engine, retiler.specs, communicator.device)
        self._everything = (True,) * (2 * len(engine.pairs))
        places: dict[int, list[int]] = {}
        for place, pair in enumerate(by_expert(engine.pairs)):
            places.setdefault(pair.lora_rank, []).append(place)
        device = communicator.device  # indexing with a list would make every step wait for the device
        self._places = {r: torch.tensor(of_rank, device=device) for r, of_rank in places.items()}
        self.grams: Matrices = {}
        self._matrices: Matrices = {}

    def figures(self) -> dict[str, float]:
        if not self.grams:
            return {}
        products = [self._matrices[r].mT @ both @ self._matrices[r] for r, both in self.grams.items()]
        after = [torch.diagonal(product, dim1=-2, dim2=-1).sum(dim=-1) for product in products]
        return gram_figures(self.grams) | balance_after(torch.cat(after, dim=1))

    def _rewrite(self, weights: list[Tensor], moments: Moments) -> Tensor:
        self.grams = {}  # frees the old ones before new ones are made
        channels: list[Channel] = [weights, *moments.values()]
        present = [self._everything] * len(channels)
        streams = self._retiler.to_blocks(channels, present)
        self.grams = reduce_grams(self._blocks.grams(streams[0]), self._comm)
        matrices, solved = self._solver(self.grams)
        self._matrices = matrices
        self._blocks.multiply_(streams[0], matrices)
        inverse = {r: both.flip(0) for r, both in matrices.items()}  # of the transpose: M_A^-T is M_B
        squares = {r: both.square() for r, both in inverse.items()}
        for key, stream in zip(moments, streams[1:], strict=True):
            self._blocks.multiply_(stream, inverse if key == FIRST_MOMENT else squares)
        self._retiler.from_blocks(streams, channels, present)
        return self._by_pair(solved)

    def _by_pair(self, flags: dict[int, Tensor]) -> Tensor:
        """``[P]`` bool in the order of pairs, from flags by r."""
        ordered = torch.empty(len(self._adapters), dtype=torch.bool, device=self._comm.device)
        for r, places in self._places.items():
            ordered.index_copy_(0, places, flags[r])
        return ordered
