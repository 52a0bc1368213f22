"""RefLoRA in HF Trainer, and in the trainers of TRL, as one callback."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .config import RefLoRAConfig
from .integrate import Handle, attach

logger = logging.getLogger(__name__)


class RefLoRACallback(TrainerCallback, ExportableState):
    """Attaches at the beginning of training, whatever engine the Trainer uses.

    The schedule's state goes into every checkpoint's ``trainer_state.json`` and comes back on resume.

    Args:
        config: the method and its schedule, or its settings as a dictionary.

    Attributes:
        handle: of the training that runs or ran last; None before the first.
    """

    def __init__(self, config: RefLoRAConfig | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, RefLoRAConfig) else RefLoRAConfig(**config)
        self.handle: Handle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is not None:
            self.handle.detach()
        saved = self._saved_state(state) if state.global_step else None
        self.handle = attach(kwargs["model"], kwargs["optimizer"], self.config, state_dict=saved)
        # Trainer updates this entry at every checkpoint, and fails if a resumed state lacks it.
        assert isinstance(state.stateful_callbacks, dict)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is not None:
            self.handle.detach()

    def state(self) -> dict[str, Any]:
        """What Trainer writes into ``trainer_state.json``."""
        handle_state = self.handle.state_dict() if self.handle is not None else None
        return {"args": {"config": self.config.as_dict()}, "attributes": {}, "handle": handle_state}

    def _saved_state(self, state: TrainerState) -> dict[str, Any]:
        callbacks = state.stateful_callbacks
        entry = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        if isinstance(entry, dict) and entry.get("handle"):
            return entry["handle"]
        logger.warning(
            "the checkpoint was written without RefLoRA; its %d steps count as plain LoRA steps", state.global_step
        )
        return {
            "version": 1,
            "config": self.config.as_dict(),
            "steps": state.global_step,
            "applied_steps": 0,
            "skipped_pairs": 0,
        }
