"""Say what happens between the last line before training and the first step, which may take minutes."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import TrainerCallback

from ..cluster.waiting import stage


class Beginning(TrainerCallback):
    """A context around ``Trainer.train``. Until the first evaluation or step it says what takes so long.

    Args:
        method: the method, as ``--method`` names it.
    """

    def __init__(self, method: str) -> None:
        starts = ", taking the gradients of the first batches" if method == "lora-sb" else ""
        self._what = f"preparing the engine, the optimizer and {method}{starts}"
        self._open = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._open.enter_context(stage(self._what))

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()
