"""The cost model's bytes are those that a step counts."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import cost_model
from benchmarks.costs.events import Topology
from benchmarks.harness import engines, models
from benchmarks.harness.workloads import OptimizerStep
from benchmarks.ranks import scaling as scaling_ranks
from tests.support.cluster import run_ranks


def _counted_bytes(rank: int, world_size: int, engine: str, hidden_size: int, lora_rank: int) -> int:
    shape = scaling_ranks._shape(hidden_size, 1)
    trainee = engines.wrap(engine, models.build_model(shape, lora_rank, torch.device("cpu")))
    handle = scaling_ranks.attach(trainee.model, trainee.optimizer, scaling_ranks.CONFIG)
    batch = torch.zeros(1, 4, dtype=torch.int64)
    trainee.backward(trainee.model(input_ids=batch, labels=batch).loss)
    trainee.step()
    return handle.report().bytes_per_step


def _counted_bytes_of_all(rank: int, world_size: int) -> list[int]:
    return [
        _counted_bytes(rank, world_size, engine, hidden_size, lora_rank)
        for engine, ranks, hidden_size, lora_rank in _CUT
        if ranks == world_size
    ]


@functools.cache
def _counted(world_size: int) -> list[list[int]]:
    """Of every rank, for every case on this number of ranks."""
    return run_ranks(_counted_bytes_of_all, world_size)


def _way(engine: str) -> tuple[str, str]:
    """The model's way and layout of an engine."""
    return "tall" if engines.stores_tall(engine) else "flat", engine.removesuffix("-flat")


# Hidden size 48: pieces of unequal size, rows cut between ranks, and on two ranks one with more than half of a lora_A;
# flat with r = 3 on 4 ranks: one without rows of lora_A; r = 1: lora_A whole on one rank, nothing is cut.
_CUT = [
    ("fsdp2-flat", 2, 64, 4),
    ("fsdp2-flat", 4, 48, 3),
    ("fsdp2-flat", 2, 48, 1),
    ("zero3-flat", 2, 48, 5),
    ("zero3-flat", 4, 48, 5),
    ("zero3-flat", 3, 48, 7),
    ("fsdp2", 2, 64, 4),
    ("fsdp2", 4, 48, 3),
    ("zero3", 2, 48, 5),
    ("zero3", 3, 48, 7),
    ("zero3", 4, 48, 5),
]


@pytest.mark.parametrize(("engine", "world_size", "hidden_size", "lora_rank"), _CUT)
def test_bytes_are_those_that_the_step_counts(engine: str, world_size: int, hidden_size: int, lora_rank: int) -> None:
    case = (engine, world_size, hidden_size, lora_rank)
    index = [other for other in _CUT if other[1] == world_size].index(case)
    counted = [of_rank[index] for of_rank in _counted(world_size)]
    adapters = cost_model.Adapters.of(scaling_ranks._shape(hidden_size, 1), lora_rank)
    way, layout = _way(engine)
    assert cost_model.sent_bytes(way, adapters, world_size, layout, "cpu").tolist() == counted


def _counted_bytes_of_many(rank: int, world_size: int) -> tuple[int, dict[str, int]]:
    """Of a step whose solve ranks share out."""
    workload = OptimizerStep(_MANY, 64, torch.device("cpu"), "fsdp2")
    handle = scaling_ranks.attach(workload.trainee.model, workload.trainee.optimizer, scaling_ranks.CONFIG)
    workload.prepare()
    workload.step()
    report = handle.report()
    return report.bytes_per_step, report.collectives_per_step


_MANY = scaling_ranks._shape(64, 4)  # 28 pairs, enough for two ranks


def test_a_solve_that_is_shared_out_is_gathered() -> None:
    adapters = cost_model.Adapters.of(_MANY, 64)
    counted = run_ranks(_counted_bytes_of_many, 2)
    assert all(calls == {"all_reduce": 1, "all_gather": 1} for _, calls in counted)
    sent = cost_model.sent_bytes("tall", adapters, 2, "fsdp2", "cpu")
    assert sent.tolist() == [sent_bytes for sent_bytes, _ in counted]
    topology = Topology(2, 2)
    shared, alone = (
        cost_model.step_counts("tall", adapters, topology, layout="fsdp2", device=device) for device in ("cpu", "cuda")
    )
    assert (len(shared), len(alone)) == (3, 2)  # on a GPU the solve is cheap
    assert 2 * shared[0][0]["solve_flop"] == alone[0][0]["solve_flop"]
