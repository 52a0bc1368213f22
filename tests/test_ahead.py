"""S formed ahead of its step: the same bits as in the step, and never for weights that have changed since."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from reflora_dist import Handle, RefLoRAConfig, attach
from reflora_dist.ahead import Ahead
from reflora_dist.solving import Solution
from tests.cluster import run_ranks
from tests.engines_under_test import ENGINES
from tests.engines_under_test.common import Wrapped, _train_on
from tests.workloads import Settings, build_model, synthetic_workload

ENGINES_AND_RANKS = [
    ("single", 1), ("ddp", 2), ("fsdp2", 3), ("fsdp2-shard1", 2), ("fsdp2-hsdp", 4), ("fsdp1-full", 2),
    ("fsdp1-flat", 2), ("zero2", 3), ("zero3", 2), ("zero3-subgroups", 2),
]  # fmt: skip

Change = Callable[[Wrapped, Handle], None]


class _Counted:
    """Counts how often what was formed ahead was used."""

    def __init__(self) -> None:
        self.used = 0
        take = Ahead.take
        counter = self

        def counting(ahead: Ahead, *arguments: Any) -> Solution | None:
            solution = take(ahead, *arguments)
            counter.used += solution is not None
            return solution

        Ahead.take = counting  # type: ignore[method-assign]


def _train(
    engine_name: str,
    world_size: int,
    overlap: bool,
    interval: int = 1,
    change: Change | None = None,
    method: str = "reflora",
) -> Any:
    workload = synthetic_workload(seed=5)
    wrapped = ENGINES[engine_name].wrap(build_model(workload), Settings(), workload.batches.shape[1] // world_size)
    config = RefLoRAConfig(method=method, warmup_steps=1, interval=interval, overlap=overlap)
    handle = attach(wrapped.model, wrapped.optimizer, config)
    for step, batch in enumerate(workload.batches):
        if step == 3 and change is not None:
            change(wrapped, handle)
        _train_on(wrapped, batch)
    return wrapped.factors(), handle.report()


def _both_ways(rank: int, world_size: int, engine_name: str, interval: int, method: str = "reflora") -> None:
    expected, plain = _train(engine_name, world_size, overlap=False, interval=interval, method=method)
    counted = _Counted()
    factors, ahead = _train(engine_name, world_size, overlap=True, interval=interval, method=method)
    assert all(torch.equal(factors[name], expected[name]) for name in expected)
    # the first step is a warm-up, so S can be formed ahead of every step that is applied
    assert counted.used == ahead.applied_steps == plain.applied_steps > 1
    exchanges = plain.collectives_per_step.get("all_to_all", 0)
    assert ahead.collectives_per_step.get("all_to_all", 0) == (exchanges + 2 if exchanges else 0)


@pytest.mark.parametrize(("engine_name", "world_size"), ENGINES_AND_RANKS)
def test_overlap_changes_no_bit(engine_name: str, world_size: int) -> None:
    run_ranks(_both_ways, world_size, engine_name, 1, timeout=300)


@pytest.mark.parametrize(("engine_name", "world_size"), [("fsdp2", 2), ("zero3-subgroups", 2)])
def test_overlap_changes_no_bit_of_scaled_gd(engine_name: str, world_size: int) -> None:
    """Its inverses, too, depend on the weights alone."""
    run_ranks(_both_ways, world_size, engine_name, 1, "scaled-gd", timeout=300)


def test_with_an_interval_only_steps_that_are_due_are_prepared() -> None:
    run_ranks(_both_ways, 1, "single", 2, timeout=300)


@torch.no_grad()
def _scale(wrapped: Wrapped, handle: Handle) -> None:
    for parameter in wrapped.optimizer.param_groups[0]["params"]:
        parameter.mul_(1.5)


@torch.no_grad()
def _load(wrapped: Wrapped, handle: Handle) -> None:
    state = {name: 1.5 * value for name, value in wrapped.model.state_dict().items() if "lora_" in name}
    wrapped.model.load_state_dict(state, strict=False)


def _replace(wrapped: Wrapped, handle: Handle) -> None:
    for parameter in wrapped.optimizer.param_groups[0]["params"]:
        parameter.data = 1.5 * parameter.data


def _scale_through_data(wrapped: Wrapped, handle: Handle) -> None:
    for parameter in wrapped.optimizer.param_groups[0]["params"]:
        parameter.data.mul_(1.5)


def _scale_and_say(wrapped: Wrapped, handle: Handle) -> None:
    _scale_through_data(wrapped, handle)
    handle.weights_changed()


@torch.no_grad()
def _scale_masters_and_say(wrapped: Wrapped, handle: Handle) -> None:
    for master in wrapped.optimizer.fp32_partitioned_groups_flat:
        master.data.mul_(1.5)
    handle.weights_changed()


def _changed(rank: int, world_size: int, engine_name: str, change: Change) -> None:
    expected, _ = _train(engine_name, world_size, overlap=False, change=change)
    counted = _Counted()
    factors, report = _train(engine_name, world_size, overlap=True, change=change)
    assert all(torch.equal(factors[name], expected[name]) for name in expected)
    assert counted.used == report.applied_steps - 1


_CHANGES = [
    ("single", 1, _scale), ("single", 1, _load), ("single", 1, _replace), ("single", 1, _scale_and_say),
    ("fsdp2", 2, _load), ("fsdp2", 2, _scale_and_say), ("zero3", 2, _scale_masters_and_say),
]  # fmt: skip


@pytest.mark.parametrize(("engine_name", "world_size", "change"), _CHANGES)
def test_what_was_formed_is_dropped_when_weights_change(engine_name: str, world_size: int, change: Change) -> None:
    run_ranks(_changed, world_size, engine_name, change, timeout=300)


def test_a_change_that_nobody_can_see_is_an_error() -> None:
    """Never in silence: norms tell what tensor.data hides."""
    with pytest.raises(RuntimeError, match=r"weights_changed\(\)"):
        _train("single", 1, overlap=True, change=_scale_through_data)


def _changed_on_several_ranks(rank: int, world_size: int) -> None:
    with pytest.raises(RuntimeError, match=r"weights_changed\(\) on every rank"):
        _train("fsdp2", world_size, overlap=True, change=_scale)


def test_a_change_among_several_ranks_is_an_error() -> None:
    """A rank that went on alone, with S formed anew, would leave the others waiting."""
    run_ranks(_changed_on_several_ranks, 2, timeout=300)


def test_a_factor_that_is_not_a_number_is_no_change() -> None:
    """With overlap as without, such a pair is left alone and counted."""

    def spoil(wrapped: Wrapped, handle: Handle) -> None:
        wrapped.optimizer.param_groups[0]["params"][0].data[0] = float("nan")
        handle.weights_changed()

    _, report = _train("single", 1, overlap=True, change=spoil)
    _, expected = _train("single", 1, overlap=False, change=spoil)
    assert report.skipped_pairs == expected.skipped_pairs > 0
