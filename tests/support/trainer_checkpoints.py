"""HF Trainer with the callback, its checkpoints, and the factors when they were written."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from reflora_dist import RefLoRACallback, RefLoRAConfig
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test import trainer as trainer_engines
from tests.support.engines_under_test.accelerated import gathered
from tests.support.engines_under_test.common import mean_over_ranks
from tests.support.workloads import (
    Factors,
    build_model,
    synthetic_workload,
    with_method,
)

STEPS, SAVE_STEPS, WORLD_SIZE = 6, 2, 2
# warm-up until after the first checkpoint, so that a schedule that restarts on resume shows
SCHEDULE: dict[str, Any] = {"warmup_steps": 3, "interval": 2}


class Outcome(NamedTuple):
    """What a rank saw of a run: losses, final factors, and the factors when each checkpoint was written."""

    losses: list[float]
    factors: Factors
    saved: dict[int, Factors]
    handle: dict[str, Any]
    eval_losses: list[float]


class _FactorsAtSave(TrainerCallback):
    """Gathers the factors whenever a checkpoint has been written; or ends the process instead."""

    def __init__(self, kill_after: int | None) -> None:
        self.saved: dict[int, Factors] = {}
        self.kill_after = kill_after
        self.trainer: Any = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved[state.global_step] = gathered(self.trainer.accelerator, self.trainer.model_wrapped)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kill_after is not None and state.global_step > self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def train_with_checkpoints(
    rank: int,
    world_size: int,
    engine_name: str,
    method: str,
    output_dir: str,
    resume_from: str | None = None,
    kill_after: int | None = None,
    best: bool = False,
) -> Outcome:
    for version in (1, 2):
        trainer_engines._FSDP_CONFIG[version]["state_dict_type"] = "SHARDED_STATE_DICT"
    workload = synthetic_workload(steps=STEPS)
    options = {"apply_escape": True} if method == "lora-rite" else {}
    settings = with_method(dataclasses.replace(workload.settings, clip=0.5, grad_accum=2), method, **options)
    config = RefLoRAConfig(method=method, **({} if method in METHOD_OPTIMIZERS else SCHEDULE))
    callback, recorder = RefLoRACallback(config), _FactorsAtSave(kill_after)
    trainer = ENGINES[engine_name].trainer(build_model(workload), workload.batches, settings, [callback, recorder])
    recorder.trainer = trainer
    trainer.args.output_dir = output_dir
    trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, SAVE_STEPS
    if best:
        _keep_best(trainer)
    trainer.train(resume_from_checkpoint=resume_from)
    assert callback.handle is not None
    micro_losses = mean_over_ranks(trainer.micro_losses)
    return Outcome(
        micro_losses,
        gathered(trainer.accelerator, trainer.model_wrapped),
        recorder.saved,
        callback.handle.state_dict(),
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
    )


def _keep_best(trainer: Any) -> None:
    """Evaluate at every save, as if the second checkpoint were the best, and reload it at the end."""
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, SAVE_STEPS
    trainer.args.load_best_model_at_end = True
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", False
    evaluate = trainer.evaluate

    def with_best_at_step_4(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**evaluate(*args, **kwargs), "eval_loss": float(abs(trainer.state.global_step - 4))}

    trainer.evaluate = with_best_at_step_4
