"""The choice of the step class for each kind of method."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..collectives.communicator import Communicator
from ..collectives.retile import Retiler
from ..engines.base import Engine
from ..engines.pairs import by_expert, numbers_by_expert
from ..methods.base import FactorMethod, MatrixMethod, OptimizerMethod, RescalingMethod
from ..methods.config import RefLoRAConfig
from ..methods.registry import METHODS
from .base import Step
from .gradient_step import GradientStep
from .muon_step import MuonStep
from .optimizer_step import OptimizerStep
from .rewriting_step import FactorStep, RescalingStep
from .rite_step import RiteStep
from .solver import Solver

_OPTIMIZER_STEPS: dict[str, type[OptimizerStep]] = {"lora-muon": MuonStep, "lora-rite": RiteStep}


def make_step(engine: Engine, config: RefLoRAConfig, communicator: Communicator, hopeless: Sequence[int]) -> Step:
    """Make the step of the configured method. Every rank must call.

    Args:
        engine: the engine that was found, with its pairs.
        config: the method and its settings.
        communicator: made for the engine's group.
        hopeless: numbers of the pairs on which the method can never act.

    Raises:
        ValueError: on every rank; the optimizer's state is that of another optimizer.

    Communication: one all-gather of small objects for a method that is an optimizer, otherwise none.
    """
    method = METHODS[config.method]
    if issubclass(method, RescalingMethod):
        return RescalingStep(method(), engine, communicator)
    if issubclass(method, MatrixMethod):
        pairs = by_expert(engine.pairs)
        numbers = numbers_by_expert(engine.pairs)
        unsolvable = [place for place, number in enumerate(numbers) if number in hopeless]
        scalings, lora_ranks = [pair.scaling for pair in pairs], [pair.lora_rank for pair in pairs]
        solver = Solver(method, config, scalings, lora_ranks, communicator, unsolvable)
        retiler = _retiler(engine, communicator)
        if issubclass(method, FactorMethod):
            return FactorStep(engine, retiler, communicator, solver, method.carries_moments(config))
        return GradientStep(
            engine, retiler, communicator, solver, method.uses_gradients, method.carries_moments(config), hopeless
        )
    if issubclass(method, OptimizerMethod):
        return _OPTIMIZER_STEPS[config.method].connected(engine, _retiler(engine, communicator), communicator)
    return Step(engine, communicator)


def _retiler(engine: Engine, communicator: Communicator) -> Retiler:
    """Make the retiler. It exchanges float64 if any factor is float64, otherwise float32."""
    double = any(weight.dtype == torch.float64 for weight in engine.weights())
    return Retiler(engine.layouts(), communicator, torch.float64 if double else torch.float32)
