"""Refuse settings that need evaluations where there are none. transformers accepts them, and they have no effect."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from reflora_dist.collectives.ranks import is_first_rank

if TYPE_CHECKING:
    from .options import Options

logger = logging.getLogger(__name__)
# Settings that need evaluations, each with the values that do; None: every value except None.
_NEED_EVALUATIONS: dict[str, tuple[Any, ...] | None] = {
    "save_strategy": ("best",),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
    "load_best_model_at_end": (True,),
    "metric_for_best_model": None,
    "greater_is_better": None,
}


class NoEvaluations(ValueError):
    """A setting needs evaluations, and none will take place."""


def check_strategy(training: Any) -> None:
    """Refuse settings that need evaluations if ``--eval_strategy`` is no.

    Raises:
        NoEvaluations: the message names the setting.
    """
    setting = _setting_in_need(training)
    if setting and training.eval_strategy == "no":
        raise NoEvaluations(
            f"{setting} needs evaluations during training: give --eval_dataset or --eval_fraction, and --eval_strategy "
            "steps or epoch"
        )


def check_evaluations(options: Options) -> None:
    """Refuse evaluations without records, and a best model by a metric that does not exist.

    Raises:
        ValueError: the message names the setting.
    """
    training, data = options.training, options.data
    asked = {
        "eval_strategy": training.eval_strategy != "no",
        "eval_on_start": training.eval_on_start,
        "max_eval_records": data.max_eval_records is not None and not options.classification.mismatched_dataset,
    }
    for name in asked if not data.has_eval_records else ():
        if asked[name]:
            value = getattr(data if name == "max_eval_records" else training, name)
            raise NoEvaluations(
                f"{name}={shown(value)}: there are no records to evaluate on; give --eval_dataset or --eval_fraction, "
                f"or drop --{name}"
            )
    for name in ("eval_steps", "eval_delay") if not data.has_eval_records and is_first_rank() else ():
        if (value := getattr(training, name)) != getattr(type(training), name):
            logger.warning("%s=%g is void: there are no records to evaluate on", name, value)
    metrics = ("loss", *options.classification.metrics)
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        raise ValueError(f"metric_for_best_model={metric!r} is none of this task's: {', '.join(metrics)}")


class EvaluationsToCome(TrainerCallback):
    """Refuse settings that need evaluations if ``--eval_delay`` outlasts the training, once its length is known."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        setting = _setting_in_need(args)
        by_epoch = args.eval_strategy == "epoch"
        batches = state.max_steps * args.gradient_accumulation_steps
        length = batches / len(kwargs["train_dataloader"]) if by_epoch else state.max_steps
        if setting and args.eval_delay > length:
            raise NoEvaluations(
                f"{setting} needs evaluations, but eval_delay={args.eval_delay:g} is longer than the training of "
                f"{length:g} {'epochs' if by_epoch else 'steps'}: lower it"
            )


def _setting_in_need(training: Any) -> str | None:
    for name, values in _NEED_EVALUATIONS.items():
        value = getattr(training, name)
        if value is not None if values is None else value in values:
            return f"{name}={shown(value)}"
    return None


def shown(value: Any) -> Any:
    """Return a setting as it is written on the command line, also if transformers has made an enum of it."""
    return getattr(value, "value", value)
