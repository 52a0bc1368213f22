"""The figures for logs: they are right under every engine, cost no waiting, and reach what Trainer reports to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from reflora_dist import Handle, RefLoRACallback, RefLoRAConfig, attach
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.figures import gram_figures
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.oracles import train_oracle
from tests.support.small import backward, small_batches, small_model, trainable
from tests.support.workloads import (
    Factors,
    Settings,
    Workload,
    build_model,
    synthetic_workload,
    train_single,
    with_method,
)

STEPS = 3
CONDITIONS = {"gram_condition_median", "gram_condition_max"}
BALANCES = {"balance_min", "balance_median", "balance_max"}
COSTS = {"skipped_pairs", "skipped_share", "bytes_per_step", "step_ms"}
REWRITING = ("reflora-s", "balora")  # which know the balance after their step


def _config(method: str) -> RefLoRAConfig:
    """The method acts in the last step alone, so that its factors before are those of plain LoRA."""
    after_steps = {"reflora-s": STEPS, "balora": STEPS}
    warmup_steps = {**after_steps, **dict.fromkeys(METHOD_OPTIMIZERS, 0)}.get(method, STEPS - 1)
    return RefLoRAConfig(method=method, warmup_steps=warmup_steps)


def _settings(workload: Workload, method: str) -> Settings:
    return with_method(workload.settings, method)


def _train(rank: int, world_size: int, engine_name: str) -> dict[str, tuple[dict[str, float], int]]:
    """Figures and the report's bytes of every method."""
    found = {}
    for method in METHODS:
        workload = synthetic_workload(steps=STEPS)
        handles: list[Handle] = []
        ENGINES[engine_name].train(
            build_model(workload),
            workload.batches,
            _settings(workload, method),
            lambda model, optimizer, to=handles, of=method: to.append(attach(model, optimizer, _config(of))),
        )
        found[method] = handles[0].figures(), handles[0].report().bytes_per_step
    return found


def _factors_before(method: str) -> Factors:
    """The whole factors when the method acted for the last time, in one process."""
    workload = synthetic_workload(steps=STEPS)
    batches = workload.batches if method in ("reflora-s", "balora") else workload.batches[:-1]
    model, settings = build_model(workload), _settings(workload, method)
    if method in METHOD_OPTIMIZERS:
        return train_oracle(model, batches, settings, RefLoRAConfig(method=method))[1]
    return train_single(model, batches, settings)[1]


def _expected(factors: Factors) -> dict[str, float]:
    a, b = ([factors[name] for name in sorted(factors) if f"lora_{side}." in name] for side in "AB")
    conditions = torch.stack([torch.linalg.cond(factor.double()) ** 2 for factor in [*a, *b]])
    balances = torch.stack([x.double().norm() / y.double().norm() for x, y in zip(a, b, strict=True)])
    return {
        "gram_condition_median": conditions.median().item(),
        "gram_condition_max": conditions.max().item(),
        "balance_min": balances.min().item(),
        "balance_median": balances.median().item(),
        "balance_max": balances.max().item(),
    }


@pytest.mark.parametrize(
    "engine_name",
    [
        "fsdp2",
        "zero3-subgroups",
        *(
            pytest.param(name, marks=pytest.mark.all_ranks)
            for name in ("ddp", "fsdp2-shard1", "fsdp1-full", "zero2", "zero2-two-groups", "zero3")
        ),
    ],
)
def test_figures_are_those_of_the_whole_factors(engine_name: str) -> None:
    """On every rank, whatever part of the factors it holds. Only LoRA itself has none."""
    outcomes = run_ranks(_train, 2, engine_name)
    for method in METHODS:
        expected = _expected(_factors_before(method))
        for outcome in outcomes:
            figures, sent_bytes = outcome[method]
            if method == "lora":
                assert not figures
                continue
            after = {"balance_after_median"} if method in REWRITING else set()
            assert figures.keys() == (BALANCES if method == "reflora-s" else CONDITIONS | BALANCES) | COSTS | after
            if after:
                assert figures["balance_after_median"] == pytest.approx(1.0, rel=1e-6)
            for name in figures.keys() & expected.keys():
                # fp32 training in another order of sums; a step earlier or later differs by 2e-3
                assert figures[name] == pytest.approx(expected[name], rel=1e-4), (method, name)
            assert figures["bytes_per_step"] == sent_bytes
            assert (sent_bytes > 0) == (engine_name != "ddp")
            assert 0.01 < figures["step_ms"] < 60_000
            assert figures["skipped_pairs"] == 0


@pytest.mark.parametrize("method", ["reflora", "scaled-gd", "lora-pro"])
def test_the_change_of_the_gradients_is_measured_where_it_is_watched(method: str) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    handle = attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=0))
    first, second, third = small_batches(3)
    backward(model, first)
    optimizer.step()
    assert "gradient_change" not in handle.figures()
    optimizer.zero_grad()
    backward(model, second)
    before = [parameter.grad.clone() for parameter in trainable(model)]
    handle.watch_next_step()
    optimizer.step()
    changed = sum((p.grad - old).square().sum() for p, old in zip(trainable(model), before, strict=True))
    expected = math.sqrt(changed / sum(old.square().sum() for old in before))
    assert handle.figures()["gradient_change"] == pytest.approx(expected, rel=1e-9) and expected > 1e-2
    optimizer.zero_grad()
    backward(model, third)
    optimizer.step()
    assert handle.figures()["gradient_change"] == pytest.approx(expected, rel=1e-9), "the last one that was watched"


def test_pairs_without_full_rank_are_left_out() -> None:
    """What is infinite or not a number would be no JSON, and would hide the other pairs."""
    grams = torch.diag_embed(torch.tensor([8.0, 4.0, 2.0], dtype=torch.float64)).repeat(2, 5, 1, 1)
    grams[1] *= 4
    grams[1, 1] = 0.0
    grams[0, 2, 0, 0] = float("nan")
    grams[0, 3] = torch.ones(3, 3)
    figures = gram_figures({3: grams})
    assert figures["gram_condition_max"] == figures["gram_condition_median"] == pytest.approx(4.0)
    assert figures["balance_max"] == figures["balance_median"] == 0.5
    assert figures["balance_min"] == pytest.approx(math.sqrt(3 / 56))
    assert gram_figures({3: torch.zeros(2, 1, 3, 3, dtype=torch.float64)}) == {}


def test_figures_follow_the_schedule() -> None:
    """None before the method has acted; between its steps those of the last one; skipped pairs are counted."""
    model = small_model(from_zero=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    handle = attach(model, optimizer, RefLoRAConfig(warmup_steps=0, interval=2))
    assert handle.figures() == {}
    found = []
    for batch in small_batches(4):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        found.append(handle.figures())
    assert found[0]["skipped_pairs"] == 2 and "balance_max" not in found[0]  # B = 0
    assert found[1] == found[0]
    assert found[2]["skipped_pairs"] == 2 and found[2]["balance_max"] > 1
    assert found[3] == found[2]


class _Reads(TorchDispatchMode):
    """Counts how often a tensor's value is read, which makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# The others read values on a CPU, to end an iteration early or to count steps; tests/gpu/test_gpu.py has all of them.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("method", ["scaled-gd", "reflora-s"])
def test_nothing_is_read_before_figures_are_asked_for(method: str, dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, foreach=True)
    handle = attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=1))
    reads = _Reads()
    for batch in small_batches(3, dtype=dtype):
        backward(model, batch)
        hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
        with reads:
            for hook in hooks:
                hook(optimizer, (), {})
        optimizer.zero_grad()
    assert reads.count == 0
    with reads:
        assert handle.figures()
    assert reads.count > 0


class _Logs(TrainerCallback):
    """What a user's callback is given, and how often figures had been asked for by then."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


def _train_and_log(rank: int, world_size: int, engine_name: str, output_dir: str) -> dict[str, Any]:
    """Logs at steps 2 and 4 of 4, and evaluates at both."""
    asked = []
    figures = Handle.figures
    Handle.figures = lambda self: asked.append(self._steps) or figures(self)  # type: ignore[method-assign]
    try:
        workload = synthetic_workload(steps=4)
        callback, logs = RefLoRACallback(RefLoRAConfig(warmup_steps=1)), _Logs()
        trainer = ENGINES[engine_name].trainer(
            build_model(workload),
            workload.batches,
            workload.settings,
            [callback, logs],
            output_dir=output_dir,
            report_to="tensorboard",
            logging_steps=2,
        )
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
    finally:
        Handle.figures = figures  # type: ignore[method-assign]
    return {"asked": asked, "history": trainer.state.log_history, "seen": logs.seen}


@pytest.mark.parametrize(
    "engine_name",
    [
        "zero3-sft",
        *(
            pytest.param(name, marks=pytest.mark.all_ranks)
            for name in ("ddp-trainer", "fsdp1-trainer", "fsdp2-trainer", "zero2-trainer", "zero3-trainer", "fsdp2-sft")
        ),
    ],
)
def test_figures_are_among_what_trainer_reports(engine_name: str, tmp_path: Path) -> None:
    """In the history, in the logs of callbacks and in TensorBoard's files: at logging steps, with the training loss."""
    outcomes = run_ranks(_train_and_log, 2, engine_name, str(tmp_path))
    names = {f"reflora/{name}" for name in CONDITIONS | BALANCES | COSTS | {"gradient_change"}}
    for outcome in outcomes:
        assert outcome["asked"] == [2, 4]
        for entries in (outcome["history"], [logs for _, logs in outcome["seen"]]):
            assert len(entries) == 4  # two logs, the summary, the evaluation
            for entry in entries:
                assert names & entry.keys() == (names if "loss" in entry else set())
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent)).Reload()
    for name in names:
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        expected = [(entry["step"], entry[name]) for entry in outcomes[0]["history"] if "loss" in entry]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
