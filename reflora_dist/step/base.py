"""The interface of a step: what a method does around the optimizer's update."""

from __future__ import annotations

from torch import Tensor

from ..collectives.communicator import Communicator
from ..engines.base import Engine, Firing
from .figures import Stopwatch


class Step:
    """The actions of a method before and after an optimizer's update. This base class does nothing: plain LoRA.

    ``before_first_step``, ``before_update`` and ``after_update`` return None if the method did not begin to act.
    Otherwise they return the number of pairs that the method left as they are, a 0-dim int64 tensor on the
    communicator's device. A step never waits for the device.

    Args:
        engine: the engine whose optimizer is stepped.
        communicator: made for the ranks that together hold one copy of the factors.

    Attributes:
        stopwatch: times what the method does in a step.
        watched: whether the coming step also measures what it changes, for a log. That takes time, but no message.
    """

    def __init__(self, engine: Engine, communicator: Communicator) -> None:
        self._engine = engine
        self._comm = communicator
        self.stopwatch = Stopwatch(communicator.device)
        self.watched = False

    def before_first_step(self, *, due: bool) -> Tensor | None:
        """Act when a new run is attached. Called on every rank.

        Args:
            due: whether the schedule lets the method act before the first step.
        """
        return None

    def before_update(self, firing: Firing, *, due: bool, begins: bool) -> Tensor | None:
        """Act when gradients are ready and weights are not updated yet. Called on every rank.

        Args:
            firing: the call of ``optimizer.step`` that is about to happen.
            due: whether the schedule lets the method act in this step.
            begins: whether this is the first step in which it does.
        """
        return None

    def after_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        """Act when the weights of this firing are updated. Called on every rank.

        Args:
            firing: the call of ``optimizer.step`` that has happened.
            due: whether the schedule lets a method act on updated factors; False before the last firing.
        """
        return None

    def figures(self) -> dict[str, float]:
        """Return figures of the factors before the last step in which the method acted. Waits for the device; local."""
        return {}

    def close(self) -> None:
        """Release what the step holds. Called when the handle is detached."""
