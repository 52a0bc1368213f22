"""The callback that attaches a method in HF Trainer and in TRL's trainers."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import SaveStrategy

from .checkpoints.adapter_files import has_resized_vocabulary, load_adapter, load_frozen, save_adapter
from .checkpoints.start_file import mark_of, require_same_start, write_start
from .checkpoints.trainer_folders import checkpoint_folder, keep_parameters_names, resumed_checkpoint
from .checkpoints.training_state import load_checkpoint, save_into
from .engines.pairs import find_peft_model, lora_layers
from .engines.tall import tall_adapters
from .methods.config import RefLoRAConfig
from .step.handle import Handle, attach
from .step.handle_state import handle_state
from .step.report import Report

logger = logging.getLogger(__name__)


class RefLoRACallback(TrainerCallback, ExportableState):
    """Attaches the method when training begins, under any engine that the Trainer uses.

    Every checkpoint's ``trainer_state.json`` holds the state of the schedule, which a resumed run reads. Trainer may
    leave some things out of its checkpoints, so the callback adds them: under FSDP the adapter, under FSDP1 also the
    optimizer's state, and with a resized vocabulary, under every engine, the adapter with the embedding.

    Every log of the training loss contains the figures of :meth:`Handle.figures`, as ``reflora/step_ms`` and so on.
    Between logs nothing waits for the device.

    Without ``warmup_steps`` in the configuration, the warm-up takes the smaller of the method's default and a tenth of
    the training's steps. A resumed run keeps the number of the saved run, also if its length changes.

    Args:
        config: the method and its schedule, or its settings as a dictionary.
        tall: whether to store lora_A tall (:func:`reflora_dist.tall_adapters`) before Trainer wraps the model. None
            stores it tall under FSDP and DeepSpeed only. A resumed run needs the storage of the saved run.

    Attributes:
        config: the method and its schedule; from the beginning of training with the warm-up that is taken.
        handle: the handle of the current or last training; None before the first.
    """

    def __init__(self, config: RefLoRAConfig | Mapping[str, Any], tall: bool | None = None) -> None:
        self._asked = config if isinstance(config, RefLoRAConfig) else RefLoRAConfig(**config)
        self.config = self._asked
        self.tall = tall
        self.handle: Handle | None = None
        self._start: str | None = None
        self._resized = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store lora_A tall if wanted: at this time the model is bare and has no optimizer."""
        wanted = _is_sharded() if self.tall is None else self.tall
        model = kwargs.get("model")
        if wanted and model is not None and kwargs.get("optimizer") is None and lora_layers(model):
            count = tall_adapters(model)
            logger.debug("%d lora_A are stored tall", count)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _come_before_reporters(self)
        if self.handle is not None:
            self.handle.detach()
        self.config = self._config_for(state)
        saved = self._saved_state(state) if state.global_step else None
        if state.global_step:
            require_same_start(kwargs["model"], self._saved_start(state), "the checkpoint")
        self._start = mark_of(kwargs["model"])
        _require_reference(args, kwargs["model"])
        self._resized = has_resized_vocabulary(kwargs["model"])
        if state.global_step and isinstance(kwargs["model"], FullyShardedDataParallel):
            load_checkpoint(resumed_checkpoint(args, state), kwargs["model"], kwargs["optimizer"])
        elif state.global_step and self._resized:
            # the engine's own state lacks the frozen embedding
            load_frozen(kwargs["model"], resumed_checkpoint(args, state))
        self.handle = attach(kwargs["model"], kwargs["optimizer"], self.config, state_dict=saved)
        if args.save_strategy != SaveStrategy.NO and self.handle.report().engine.startswith("fsdp"):
            find_peft_model(kwargs["model"])  # raises now what on_save would raise later
        assert self.config.warmup_steps is not None
        if self.config.method != "lora" and 0 < state.max_steps <= self.config.warmup_steps:
            _warn(
                state,
                f"{self.config.method} begins after warmup_steps={self.config.warmup_steps} and training ends after "
                f"{state.max_steps}: all of it is plain LoRA. Set RefLoRAConfig(warmup_steps=...) below that "
                "(finetune.py --reflora_warmup_steps)",
            )
        # Trainer updates this entry at every checkpoint, and fails if a resumed state lacks it.
        assert isinstance(state.stateful_callbacks, dict)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def report(self) -> Report:
        """Return the handle's report.

        Raises:
            RuntimeError: training has not begun.
        """
        if self.handle is None:
            raise RuntimeError(
                "report() before training: the method is attached in on_train_begin (of the callback that Trainer "
                "makes itself, if restore_callback_states_from_checkpoint=True)"
            )
        return self.handle.report()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        logged = step % state.logging_steps == 0 if state.logging_steps else False
        if self.handle is not None and (logged or step == state.max_steps or (step == 1 and args.logging_first_step)):
            self.handle.watch_next_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.handle is None or logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        figures = {f"reflora/{name}": value for name, value in self.handle.figures().items()}
        logs.update(figures)
        state.log_history[-1].update(figures)  # Trainer has just appended a copy of the log

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        engine = self.handle.report().engine if self.handle is not None else ""
        if engine == "fsdp1":
            # Trainer's own checkpoint has no factors, since PEFT does not find its layers under FSDP1's wrappers, and
            # accelerate does not load its sharded optimizer state.
            assert self.handle is not None
            save_into(checkpoint_folder(args, state), kwargs["model"], kwargs["optimizer"], self.handle)
        elif engine == "fsdp2" or self._resized:  # Trainer's own may lack the embedding
            if engine == "fsdp2" and state.is_world_process_zero:
                keep_parameters_names(checkpoint_folder(args, state), kwargs["model"])
            save_adapter(kwargs["model"], checkpoint_folder(args, state))
        else:
            write_start(kwargs["model"], checkpoint_folder(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is not None:
            self.handle.detach()
            report = self.handle.report()
            if report.skipped_pairs and report.skipped_pairs == report.applied_steps * report.num_pairs:
                _warn(
                    state,
                    f"{report.method} skipped every adapter in each of its {report.applied_steps} steps: training was "
                    "plain LoRA. Both factors need full rank (lora_B is zero at PEFT's start: set warmup_steps, "
                    "finetune.py --reflora_warmup_steps)",
                )
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and isinstance(kwargs["model"], FullyShardedDataParallel):
            # Trainer has just loaded the best model from files without factors (see on_save)
            load_adapter(kwargs["model"], kwargs["optimizer"], best)

    def state(self) -> dict[str, Any]:
        """Return the entry that Trainer writes into ``trainer_state.json``."""
        return {
            "args": {"config": self.config.as_dict(), "tall": self.tall},
            "attributes": {},
            "handle": self.handle.state_dict() if self.handle is not None else None,
            "start": self._start,
        }

    def _config_for(self, state: TrainerState) -> RefLoRAConfig:
        """Return the configuration with the warm-up of the saved run, or for the length of a new one."""
        handle = self._saved_entry(state).get("handle") if state.global_step else None
        saved = handle.get("config") if isinstance(handle, Mapping) else None
        steps = saved.get("warmup_steps") if isinstance(saved, Mapping) else None
        same_method = isinstance(saved, Mapping) and saved.get("method") == self._asked.method
        if self._asked.has_default_warmup and same_method and isinstance(steps, int):
            return dataclasses.replace(self._asked, warmup_steps=steps)
        return self._asked.for_steps(state.max_steps)

    def _saved_start(self, state: TrainerState) -> str | None:
        return self._saved_entry(state).get("start")

    def _saved_state(self, state: TrainerState) -> dict[str, Any]:
        saved = self._saved_entry(state).get("handle")
        if saved:
            return saved
        logger.warning(
            "the checkpoint was written without RefLoRA; its %d steps count as plain LoRA steps", state.global_step
        )
        return handle_state(self.config, state.global_step)

    def _saved_entry(self, state: TrainerState) -> dict[str, Any]:
        callbacks = state.stateful_callbacks
        entry = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        return entry if isinstance(entry, dict) else {}


def _is_sharded() -> bool:
    """Return whether accelerate, which Trainer has set up, shards with FSDP or DeepSpeed."""
    kind = AcceleratorState._shared_state.get("distributed_type")
    return kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def _require_reference(args: TrainingArguments, model: Any) -> None:
    """Refuse a preference trainer whose reference model would not be the base that the user gave.

    TRL switches the adapter off for the reference. If it was given a PEFT model, it takes a copy of the adapter, named
    ref, which is right for every start.

    Raises:
        ValueError: the adapter's start changed the base, so the base without the adapter is another model.
    """
    mark, beta = mark_of(model), vars(args).get("beta")  # of DPOConfig, GRPOConfig and their relatives
    if mark and beta and "ref" not in find_peft_model(model).peft_config:
        raise ValueError(
            f"{type(args).__name__}(beta={beta}): the reference model is the base without its adapter, and the "
            f"start of this adapter changed the base ({mark.partition(':')[0]}): make the adapter and its start before "
            "the trainer, and give it the PEFT model without peft_config and ref_model, so that it keeps a copy"
        )


def _warn(state: TrainerState, text: str) -> None:
    if state.is_world_process_zero:
        logger.warning(text)


def _come_before_reporters(callback: TrainerCallback) -> None:
    """Move a callback to the front of the list of the handler that is calling it.

    Trainer lists the reporters of ``report_to`` before a user's callbacks, so these would add to a log too late. The
    handler is looked up on the call stack, since Trainer passes callbacks neither itself nor the list.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks.sort(key=lambda other: other is not callback)  # stable for the others
            return
        frame = frame.f_back
