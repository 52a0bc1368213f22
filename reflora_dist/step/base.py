"""The one interface of a step: what a method does around the optimizer's update."""

from __future__ import annotations

from torch import Tensor

from ..collectives.communicator import Communicator
from ..engines.base import Engine, Firing
from .figures import Stopwatch


class Step:
    """What a method does before and after an optimizer's update. This one does nothing: plain LoRA.

    Every call returns None where the method did not begin to act, else the number of pairs that it left as they are,
    a 0-dim int64 tensor on the communicator's device. A step never waits for the device.

    Args:
        engine: whose optimizer is stepped.
        communicator: over the ranks that together hold one copy of the factors.

    Attributes:
        stopwatch: times what the method does in a step.
    """

    def __init__(self, engine: Engine, communicator: Communicator) -> None:
        self._engine = engine
        self._comm = communicator
        self.stopwatch = Stopwatch(communicator.device)

    def before_first_step(self, *, due: bool) -> Tensor | None:
        """At attach time of a new run. On every rank."""
        return None

    def before_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        """Gradients are there, weights are still the old ones. On every rank.

        Args:
            firing: the call of ``optimizer.step`` that is about to happen.
            due: whether the schedule lets the method act in this step.
        """
        return None

    def after_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        """Weights are updated. On every rank.

        Args:
            firing: the call of ``optimizer.step`` that has happened.
            due: whether the schedule lets a method act that works on updated factors; False before the last firing.
        """
        return None

    def figures(self) -> dict[str, float]:
        """Figures of the factors before the last step in which the method acted. Waits for the device; local."""
        return {}

    def close(self) -> None:
        """The handle is detached."""
