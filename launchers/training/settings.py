"""The settings of a run: written beside the adapter, kept in every checkpoint, and compared when the run is resumed."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from reflora_dist.collectives.ranks import is_first_rank

from .arguments import FinetuneArguments
from .recorder import jsonable
from .run_file import RUN_FILE, RUN_FILE_HEAD, run_file_text
from .sequences import ranks_of_a_sequence
from .used_folder import SETTINGS_ENTRY, SavedRun

if TYPE_CHECKING:
    from .options import Options

WARMUP = "reflora_warmup_steps"
GLOBAL_BATCH = "global_batch_size"
# Trainer's settings that are recorded in any case: two runs must share them to be comparable.
RECORDED_ARGUMENTS = (
    "seed",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "optim_args",
)
# They name where a run writes or what it continues, so another run has its own.
_NOT_IN_THE_FILE = frozenset((GLOBAL_BATCH, "resume_from_checkpoint", "overwrite_output_dir", "local_rank"))
# These do not change what is trained.
_WITHOUT_INFLUENCE = _NOT_IN_THE_FILE - {GLOBAL_BATCH} | {
    "output_dir", "cache_dir", "deepspeed", "disable_tqdm", "report_to", "run_name", "project", "push_to_hub",
    "eval_strategy", "eval_steps", "eval_on_start", "eval_delay", "eval_accumulation_steps", "eval_do_concat_batches",
    "per_device_eval_batch_size", "prediction_loss_only", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "enable_jit_checkpoint", "skip_memory_metrics",
    "ddp_timeout", "ddp_backend", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
}  # fmt: skip
_PREFIXES_WITHOUT_INFLUENCE = ("logging_", "log_", "save_", "hub_", "trackio_", "do_")
# The optimizer's state in the checkpoint has its own values of these.
_OF_THE_OPTIMIZER = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


class LearningRateStays(ValueError):
    """The schedule of a resumed run has a learning rate of its own, and another one was asked for."""


class RunSettings(TrainerCallback, ExportableState):
    """Keeps the settings with which a run began, and every change of them since.

    This callback must come after the method's callback, which chooses the warm-up. Before the first step it writes
    ``run.yaml``, a file for ``--config``. In a resumed run it makes the new learning rate and the new numbers of steps
    between logs, evaluations and checkpoints count; Trainer itself takes all of them from the checkpoint.

    Args:
        settings: this run's, of :func:`settings_of`.
        method_callback: the callback that applies the method; None if the method has no warm-up.
        saved: the run that is resumed, or None.

    Attributes:
        start: the settings with which the run began.
        changes: ``{"step": s, NAME: [old, new], ...}`` for every time that it was resumed with other settings.
        changed_now: the last of the changes, if it is this run's; else empty.
    """

    def __init__(self, settings: dict[str, Any], method_callback: Any, saved: SavedRun | None = None) -> None:
        self._settings = settings
        self._method_callback = method_callback
        self._unknown_before = saved is not None and saved.settings is None
        self.start: dict[str, Any] = settings if saved is None or saved.settings is None else saved.settings
        self.changes: list[dict[str, Any]] = list(saved.changes) if saved else []
        changed = differences(saved, settings) if saved and saved.settings is not None else {}
        self.changed_now = {"step": saved.step, **changed} if saved and changed else {}
        self.changes += [self.changed_now] if changed else []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = getattr(self._method_callback, "config", None)
        if config is not None and config.warmup_steps:
            self._settings[WARMUP] = config.warmup_steps
        if state.global_step:
            state.compute_steps(args, state.max_steps)  # the checkpoint's state has the numbers of the saved run
            if "learning_rate" in self.changed_now or self._unknown_before:
                self._set_learning_rate(kwargs["lr_scheduler"], args.learning_rate)
        # Trainer updates this entry at every checkpoint, and fails if a resumed state lacks it
        assert isinstance(state.stateful_callbacks, dict)
        state.stateful_callbacks[SETTINGS_ENTRY] = self.state()
        if state.is_world_process_zero:
            (Path(args.output_dir) / RUN_FILE).write_text(self._as_yaml(args.world_size), encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """Return the entry that Trainer writes into ``trainer_state.json``."""
        return {"args": {}, "attributes": {}, "settings": self.start, "settings_changed": self.changes}

    def for_metrics(self, options: Options) -> dict[str, Any]:
        """Return the settings that two runs must share to be comparable, as they were when the run began."""
        parts: list[Any] = [options.model, options.lora, options.data]
        parts += [options.classification] if options.classification.active else []
        names = [field.name for part in parts for field in dataclasses.fields(part)]
        # an earlier release's checkpoint may lack one
        return {name: self.start.get(name, self._settings[name]) for name in (*names, *RECORDED_ARGUMENTS)}

    def _set_learning_rate(self, scheduler: Any, learning_rate: float) -> None:
        """Give a schedule, which the checkpoint has restored, this run's peak learning rate."""
        inner = getattr(scheduler, "scheduler", scheduler)
        if isinstance(inner, LambdaLR):
            rates = [learning_rate * factor(inner.last_epoch) for factor in inner.lr_lambdas]
            inner.load_state_dict(inner.state_dict() | {"base_lrs": [learning_rate] * len(rates), "_last_lr": rates})
            for group, rate in zip(inner.optimizer.param_groups, rates, strict=True):
                group.update(initial_lr=learning_rate, lr=rate)
        elif not self._unknown_before:
            raise LearningRateStays(
                f"learning_rate={learning_rate} has no effect on a resumed run: {type(inner).__name__} goes on with "
                "the checkpoint's; give the former one, or start a new run from the adapter (--model CHECKPOINT)"
            )

    def _as_yaml(self, world_size: int) -> str:
        lines = [
            f"{RUN_FILE_HEAD}, on {world_size} process(es) with "
            f"{self._settings[GLOBAL_BATCH]} examples per optimizer step: finetune.py --config {RUN_FILE}",
            *(f"# {line}" for change in self.changes for line in described(change)),
        ]
        settings = {
            name: value
            for name, value in self._settings.items()
            if name not in _NOT_IN_THE_FILE and (value is not None or _default_of(name) is not None)
        }
        return run_file_text(lines, settings)


def settings_of(options: Options) -> dict[str, Any]:
    """Return a run's own options, and Trainer's that differ from their defaults, by name. They are JSON-ready."""
    training = options.training
    settings: dict[str, Any] = {}
    for part in (options.model, options.lora, options.data, options.classification):
        settings |= jsonable(part)
    settings |= {name: getattr(training, name) for name in RECORDED_ARGUMENTS}
    settings |= training.changed_from_defaults()
    groups = training.world_size // ranks_of_a_sequence(training)  # ranks of a sequence see the same examples
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * groups
    return settings | {GLOBAL_BATCH: batch}


def differences(saved: SavedRun, settings: dict[str, Any]) -> dict[str, list[Any]]:
    """Return ``{NAME: [old, new]}`` for the settings in which a run differs from the one that it resumes.

    Settings without influence on what is trained are left out.

    Raises:
        ValueError: the difference would have no effect, because the checkpoint's optimizer has its own value.
    """
    assert saved.settings is not None
    before = dict(saved.settings)
    for change in saved.changes:
        before |= {name: values[1] for name, values in change.items() if name != "step"}
    if settings.get(WARMUP) is None:
        before.pop(WARMUP, None)  # nobody asks for another one, and the run keeps its own
    found = {}
    for name in dict.fromkeys([*before, *settings]):
        old, new = (values.get(name, _default_of(name)) for values in (before, settings))
        if old == new or name in _WITHOUT_INFLUENCE or name.startswith(_PREFIXES_WITHOUT_INFLUENCE):
            continue
        if name in _OF_THE_OPTIMIZER:
            raise ValueError(
                f"{name}={new!r} has no effect on a resumed run, whose optimizer goes on with {old!r}: give --{name} "
                f"{old}, or start a new run from the adapter (--model {saved.folder})"
            )
        found[name] = [old, new]
    return found


def tell_differences(run_settings: RunSettings, saved: SavedRun) -> None:
    """Print on the first rank, one line each, in which settings a resumed run differs from the saved one."""
    if not is_first_rank():
        return
    if saved.settings is None:
        print(f"{saved.folder} does not record its run's settings, so they are not compared with these", flush=True)
    for line in described(run_settings.changed_now):
        print(line, flush=True)


def described(change: dict[str, Any]) -> list[str]:
    """Return a line for every setting of a change."""
    return [
        f"from step {change['step'] + 1} on {name}: {values[0]!r} -> {values[1]!r}"
        for name, values in change.items()
        if name != "step"
    ]


@functools.cache
def _defaults() -> dict[str, Any]:
    return FinetuneArguments.defaults()


def _default_of(name: str) -> Any:
    return _defaults().get(name)
