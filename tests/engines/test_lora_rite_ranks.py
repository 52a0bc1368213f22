"""LoRA-RITE and LoRA-Muon on several ranks: the other parameters, groups, and moments that stay sharded."""

from __future__ import annotations

import dataclasses
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from reflora_dist import LoRARite, RefLoRAConfig, attach
from reflora_dist.engines.pairs import find_pairs
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES, zero
from tests.support.engines_under_test.common import copied, train_on
from tests.support.oracles import RiteOracle, factors_in_pairs, oracle_of
from tests.support.small import trainable
from tests.support.workloads import (
    FACTOR_TOLERANCE,
    TINY_LORA,
    Factors,
    Settings,
    build_model,
    plain_name,
    synthetic_workload,
    train_single,
    with_method,
    worst_factor_error,
)

CONFIG = RefLoRAConfig(method="lora-rite")


class _Both:
    """The oracle for factors and AdamW for everything else, as one optimizer."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        factors = factors_in_pairs(model)
        taken = {id(factor) for factor in factors}
        others = [parameter for parameter in trainable(model) if id(parameter) not in taken]
        adamw = torch.optim.AdamW(others, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        self._parts = [oracle_of(model, settings), adamw]

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad()


WITH_OTHERS = Settings(weight_decay=0.1, betas=(0.8, 0.95))


def _llama_with_others(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Norms and the whole head are trained beside the factors, between which the norms lie."""
    model = build_model(synthetic_workload(), dtype=dtype, modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.requires_grad_(True)
    return model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _with_others_on_ranks(rank: int, world_size: int, engine: str, method: str) -> Factors:
    zero.assert_zero_shards = lambda *_: None  # which counts factors only
    wrapped = ENGINES[engine].wrap(_llama_with_others(), with_method(WITH_OTHERS, method), 12 // world_size)
    attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(method=method))
    for batch in synthetic_workload().batches:
        train_on(wrapped, batch)
    parameters = _trained(getattr(wrapped.model, "module", wrapped.model))
    if engine.startswith("zero3"):
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return copied(parameters)
    if engine == "fsdp2":
        return {name: p.full_tensor().detach().clone() for name, p in parameters.items()}
    return copied(parameters)


_WITH_OTHERS = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3-subgroups")


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        *((engine, "lora-rite") for engine in _WITH_OTHERS),
        ("zero2", "lora-muon"),
        *(pytest.param(e, "lora-muon", marks=pytest.mark.all_ranks) for e in _WITH_OTHERS if e != "zero2"),
    ],
)
def test_other_parameters_on_ranks(engine: str, method: str) -> None:
    """Norms and head end where AdamW takes them, factors where the oracle does, also in flat buffers they share."""
    model, settings = _llama_with_others(torch.float64), with_method(WITH_OTHERS, method)
    train_single(model, synthetic_workload().batches, settings, optimizer=_Both(model, settings))
    expected = copied(_trained(model))
    assert len(expected) == 28 + 4 + 1
    start = copied(_trained(_llama_with_others()))
    for trained in run_ranks(_with_others_on_ranks, 2, engine, method):
        assert worst_factor_error(trained, expected) < FACTOR_TOLERANCE
        assert min(float((trained[n] - start[n]).norm() / start[n].norm()) for n in trained) > 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PerSide(Settings):
    """lora_A and lora_B in groups of their own rate and decay."""

    rite: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    sides: tuple[dict[str, float], ...] = ({"lr": 2e-3, "weight_decay": 0.3}, {"lr": 2e-2, "weight_decay": 0.0})

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        groups = list(parameters)
        if not isinstance(groups[0], dict):
            lora_rank = TINY_LORA["r"]
            is_a = [parameter.shape[0] == lora_rank for parameter in groups]
            groups = [{"params": [p for p, a in zip(groups, is_a, strict=True) if a == side]} for side in (True, False)]
        return LoRARite([{**group, **side} for group, side in zip(groups, self.sides, strict=True)], betas=self.betas)


def _two_rates(rank: int, world_size: int, engine: str) -> Factors:
    workload = synthetic_workload()
    model = build_model(workload)
    return ENGINES[engine].train(model, workload.batches, _PerSide(), lambda m, o: attach(m, o, CONFIG))[1]


@pytest.mark.parametrize("engine", ["fsdp2", "zero2-two-groups", "zero3-two-groups"])
def test_groups_of_their_own_learning_rate_on_ranks(engine: str) -> None:
    """Each firing of DeepSpeed's optimizer shows one group only; the update at the end knows the rates of both."""
    settings = _PerSide()
    model = build_model(synthetic_workload(), dtype=torch.float64)
    oracle = RiteOracle(factors_in_pairs(model), lr=0.0)
    for pair in oracle._pairs:
        for side, group in zip(pair, settings.sides, strict=True):
            side.group = dict(group)
    _, expected = train_single(model, synthetic_workload().batches, settings, optimizer=oracle)
    for factors in run_ranks(_two_rates, 2, engine):
        assert worst_factor_error(factors, expected) < FACTOR_TOLERANCE


def _held_state(rank: int, world_size: int, engine: str) -> tuple[int, int, list[str]]:
    workload = synthetic_workload()
    settings = Settings(rite={"apply_escape": True})
    wrapped = ENGINES[engine].wrap(build_model(workload), settings, 12 // world_size)
    handle = attach(wrapped.model, wrapped.optimizer, CONFIG)
    for batch in workload.batches[:2]:
        train_on(wrapped, batch)
    pairs, held, whole = handle._engine.pairs, 0, []
    shapes = [shape for pair in pairs for shape in (pair.shape_a, pair.shape_b)]
    for index, (moments, (rows, columns)) in enumerate(zip(handle._engine.moments(), shapes, strict=True)):
        assert moments.keys() == {"exp_avg", "exp_avg_sq"}
        held += sum(moment.numel() for moment in moments.values())
        if any(moment.numel() == rows * columns for moment in moments.values()):
            whole.append(f"{pairs[index // 2].name} {index % 2}")
    kept = [value for state in handle._engine.optimizer.state.values() for value in state.values()]
    locals_ = [value.to_local() if hasattr(value, "to_local") else value for value in kept]
    return sum(value.numel() for value in locals_ if value.dim()), held, whole


@pytest.mark.parametrize("engine", ["fsdp2", "fsdp2-shard1", "fsdp1-full", "fsdp1-flat", "zero1", "zero2", "zero3"])
def test_moments_stay_sharded(engine: str) -> None:
    """All that the optimizer keeps is two numbers per element of the factors, dealt out over the ranks."""
    pairs = find_pairs(build_model(synthetic_workload()))
    total = 2 * sum(pair.lora_rank * (pair.in_features + pair.out_features) for pair in pairs)
    results = run_ranks(_held_state, 4, engine)
    assert sum(held for _, held, _ in results) == total
    for everything, held, whole in results:
        assert everything <= total / 4 * 1.05 + 2000, "state beside the moments"  # DeepSpeed and FSDP1 pad
        if engine in ("fsdp2", "fsdp2-shard1", "zero3"):
            assert not whole
            assert held <= total / 4 * 1.05


def _large_rank(rank: int, world_size: int) -> Factors:
    workload = synthetic_workload(lora=LARGE_RANK)
    settings = Settings(rite={})
    return ENGINES["fsdp2-shard1"].train(
        build_model(workload), workload.batches, settings, lambda m, o: attach(m, o, CONFIG)
    )[1]


LARGE_RANK = {"r": 16, "lora_alpha": 32}


def test_second_moments_over_several_rows_of_a_column_shard() -> None:
    """r = 16: 137 numbers at the head of a lora_A of 64 columns, of which each of two ranks has half."""
    workload = synthetic_workload(lora=LARGE_RANK)
    model = build_model(workload, dtype=torch.float64)
    oracle = RiteOracle(factors_in_pairs(model), **Settings(rite={}).lora_rite())
    _, expected = train_single(model, workload.batches, Settings(), optimizer=oracle)
    for factors in run_ranks(_large_rank, 2):
        assert worst_factor_error(factors, expected) < FACTOR_TOLERANCE
