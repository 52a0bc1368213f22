"""HF Trainer's checkpoints with the callback: what is in them, and that training resumes from them.

The engines are those of `engines_under_test.trainer`; FSDP1 and FSDP2 save sharded state, which is what Trainer does
not complete by itself (and full state under FSDP1 crashes torch on a CPU).
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from reflora_dist import RefLoRACallback, RefLoRAConfig
from tests.checkpoints.test_checkpoint import assert_no_frozen_base
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test import trainer as trainer_engines
from tests.support.engines_under_test.accelerated import gathered
from tests.support.engines_under_test.common import mean_over_ranks
from tests.support.oracles import trained_in_float64
from tests.support.workloads import (
    FACTOR_TOLERANCE,
    LOSS_TOLERANCE,
    Factors,
    build_model,
    synthetic_workload,
    worst_factor_error,
    worst_loss_error,
)

STEPS, SAVE_STEPS, WORLD_SIZE = 6, 2, 2
# warm-up until after the first checkpoint, so that a schedule that restarts on resume shows
SCHEDULE: dict[str, Any] = {"warmup_steps": 3, "interval": 2}
# one ulp of a reduction; a schedule, a moment or a factor that is not restored makes 1e-3 and more
TOLERANCE = {"zero2-trainer": 1e-6, "zero2-sft": 1e-6}  # measured 8e-9; every other engine is bit-equal


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


def _train(
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
    is_rite = method == "lora-rite"
    rite = {"apply_escape": True} if is_rite else None
    settings = dataclasses.replace(workload.settings, clip=0.5, grad_accum=2, rite=rite)
    config = RefLoRAConfig(method=method, **({} if is_rite else SCHEDULE))
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


def _cases() -> Iterator[Any]:
    default = {
        ("ddp-trainer", "reflora-s"),
        ("fsdp1-trainer", "reflora"),
        ("fsdp2-trainer", "reflora"),
        ("zero2-trainer", "reflora-s"),
        ("zero3-trainer", "reflora"),
        ("zero3-trainer", "reflora-s"),
        ("fsdp1-trainer", "lora-rite"),
        ("fsdp2-trainer", "lora-rite"),
        ("zero3-trainer", "lora-rite"),
    }
    for engine in ("ddp", "fsdp1", "fsdp2", "zero2", "zero3"):
        for method in ("reflora", "reflora-s", "lora-pro", "lora-rite"):
            name = f"{engine}-trainer"
            marks = [] if (name, method) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, method, marks=marks, id=f"{name}-{method}")
        yield pytest.param(f"{engine}-sft", "reflora", marks=pytest.mark.all_ranks, id=f"{engine}-sft-reflora")


@pytest.mark.parametrize(("engine_name", "method"), _cases())
def test_trainer_checkpoints_hold_the_adapter_and_resume(engine_name: str, method: str, tmp_path: Path) -> None:
    """Every checkpoint holds the adapter as PEFT loads it, equal to the gathered factors, and no frozen weight;
    resumed in the middle of the warm-up and after it, losses, factors and schedule are those of the whole run.
    """
    whole = run_ranks(_train, WORLD_SIZE, engine_name, method, str(tmp_path))
    for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS):
        written = tmp_path / f"checkpoint-{step}"
        _assert_peft_loads(written, whole[0].saved[step])
        assert_no_frozen_base(written)
    for step in (2, 4):
        resumed = run_ranks(
            _train, WORLD_SIZE, engine_name, method, str(tmp_path), str(tmp_path / f"checkpoint-{step}")
        )
        for expected, outcome in zip(whole, resumed, strict=True):
            _assert_continued(engine_name, outcome, expected, step)


def _assert_continued(engine_name: str, outcome: Outcome, expected: Outcome, step: int) -> None:
    tolerance = TOLERANCE.get(engine_name, 0.0)
    losses = expected.losses[2 * step :]  # two micro-batches per step
    assert worst_loss_error(outcome.losses, losses) <= tolerance
    assert worst_factor_error(outcome.factors, expected.factors) <= tolerance
    assert outcome.handle == expected.handle


def _assert_peft_loads(folder: Path, factors: Factors) -> None:
    saved = load_file(folder / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in factors} == saved.keys()
    workload = synthetic_workload(steps=1)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**workload.llama)), folder)
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], factor) for name, factor in factors.items())


@pytest.mark.parametrize(
    "engine_name",
    [
        "zero3-trainer",
        pytest.param("fsdp2-trainer", marks=pytest.mark.all_ranks),
        pytest.param("fsdp1-trainer", marks=pytest.mark.all_ranks),
    ],
)
def test_a_killed_trainer_resumes(engine_name: str, tmp_path: Path) -> None:
    """Every rank is ended by SIGKILL between two micro-batches after the second checkpoint; a new launch that
    resumes from it ends as the run that was not killed.
    """
    whole = run_ranks(_train, WORLD_SIZE, engine_name, "reflora", str(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match=r"exit codes \[-9"):
        run_ranks(_train, WORLD_SIZE, engine_name, "reflora", str(tmp_path / "killed"), None, 4)
    checkpoints = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    last = tmp_path / "killed" / checkpoints[-1]
    resumed = run_ranks(_train, WORLD_SIZE, engine_name, "reflora", str(last.parent), str(last))
    for expected, outcome in zip(whole, resumed, strict=True):
        _assert_continued(engine_name, outcome, expected, 4)


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


@pytest.mark.parametrize(
    "engine_name",
    [
        "fsdp2-trainer",
        "zero3-sft",
        *(
            pytest.param(f"{engine}-{kind}", marks=pytest.mark.all_ranks)
            for engine in ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")
            for kind in ("trainer", "sft")
            if f"{engine}-{kind}" not in ("fsdp2-trainer", "zero3-sft")
        ),
    ],
)
def test_the_best_model_is_loaded_at_the_end(engine_name: str, tmp_path: Path) -> None:
    """With ``load_best_model_at_end`` the model ends with the factors of the best checkpoint, on every rank. The
    evaluations in between are right, and training goes on from them as the plain method does.
    """
    workload = synthetic_workload(steps=STEPS)
    settings = dataclasses.replace(workload.settings, clip=0.5, grad_accum=2)
    _, expected = trained_in_float64(workload, settings, RefLoRAConfig(method="reflora", **SCHEDULE))
    outcomes = run_ranks(_train, WORLD_SIZE, engine_name, "reflora", str(tmp_path), None, None, True)
    losses = [_held_out_loss(factors) for factors in outcomes[0].saved.values()]
    for outcome in outcomes:
        assert worst_factor_error(outcome.saved[STEPS], expected) < FACTOR_TOLERANCE
        assert worst_loss_error(outcome.eval_losses, losses) < LOSS_TOLERANCE
        assert worst_factor_error(outcome.saved[STEPS], outcome.saved[4]) > 1e-3
        assert worst_factor_error(outcome.factors, outcome.saved[4]) == 0.0


def _held_out_loss(factors: Factors) -> float:
    workload = synthetic_workload(steps=STEPS)
    rows = workload.batches.flatten(0, 1)
    with torch.no_grad():
        return build_model(workload, initial_factors=factors)(input_ids=rows, labels=rows).loss.item()
