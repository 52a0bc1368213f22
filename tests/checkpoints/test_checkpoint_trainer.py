"""HF Trainer's checkpoints with the callback: what is in them, and that training resumes from them.

The engines are those of `engines_under_test.trainer`; FSDP1 and FSDP2 save sharded state, which is what Trainer does
not complete by itself (and full state under FSDP1 crashes torch on a CPU).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import RefLoRAConfig
from tests.support.checkpoints import assert_no_frozen_base
from tests.support.cluster import run_ranks
from tests.support.oracles import trained_in_float64
from tests.support.trainer_checkpoints import SAVE_STEPS, SCHEDULE, STEPS, WORLD_SIZE, Outcome, train_with_checkpoints
from tests.support.workloads import (
    FACTOR_TOLERANCE,
    LOSS_TOLERANCE,
    Factors,
    build_model,
    synthetic_workload,
    worst_factor_error,
    worst_loss_error,
)

# one ulp of a reduction; a schedule, a moment or a factor that is not restored makes 1e-3 and more
TOLERANCE = {"zero2-trainer": 1e-6, "zero2-sft": 1e-6}  # measured 8e-9; every other engine is bit-equal


def _cases() -> Iterator[Any]:
    default = {
        ("ddp-trainer", "reflora-s"),
        ("zero2-trainer", "reflora-s"),
        ("fsdp2-trainer", "lora-rite"),
        ("zero3-trainer", "reflora"),
    }
    for engine in ("ddp", "fsdp1", "fsdp2", "zero2", "zero3"):
        for method in ("reflora", "reflora-s", "lora-pro", "lora-rite", "lora-muon"):
            name = f"{engine}-trainer"
            marks = [] if (name, method) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, method, marks=marks, id=f"{name}-{method}")
        yield pytest.param(f"{engine}-sft", "reflora", marks=pytest.mark.all_ranks, id=f"{engine}-sft-reflora")


@pytest.mark.parametrize(("engine_name", "method"), _cases())
def test_trainer_checkpoints_hold_the_adapter_and_resume(engine_name: str, method: str, tmp_path: Path) -> None:
    """Every checkpoint holds the adapter as PEFT loads it, equal to the gathered factors, and no frozen weight;
    resumed in the middle of the warm-up and after it, losses, factors and schedule are those of the whole run.
    """
    whole = run_ranks(train_with_checkpoints, WORLD_SIZE, engine_name, method, str(tmp_path))
    for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS):
        written = tmp_path / f"checkpoint-{step}"
        _assert_peft_loads(written, whole[0].saved[step])
        assert_no_frozen_base(written)
    for step in (2, 4):
        resumed = run_ranks(
            train_with_checkpoints, WORLD_SIZE, engine_name, method, str(tmp_path), str(tmp_path / f"checkpoint-{step}")
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
    whole = run_ranks(train_with_checkpoints, WORLD_SIZE, engine_name, "reflora", str(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match=r"exit codes \[-9"):
        run_ranks(train_with_checkpoints, WORLD_SIZE, engine_name, "reflora", str(tmp_path / "killed"), None, 4)
    checkpoints = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    last = tmp_path / "killed" / checkpoints[-1]
    resumed = run_ranks(train_with_checkpoints, WORLD_SIZE, engine_name, "reflora", str(last.parent), str(last))
    for expected, outcome in zip(whole, resumed, strict=True):
        _assert_continued(engine_name, outcome, expected, 4)


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
    outcomes = run_ranks(train_with_checkpoints, WORLD_SIZE, engine_name, "reflora", str(tmp_path), None, None, True)
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
