"""What attach costs one rank of thousands: its limits, stand-ins that cut as the engines do, ranks that disagree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from benchmarks import attach_scale
from benchmarks.costs.traffic import Adapters
from benchmarks.harness import engines, models, variants
from benchmarks.harness.deliveries import Deliveries
from benchmarks.harness.workloads import TrainingStep, meta_adapters
from benchmarks.reports import attach_scale as report
from reflora_dist import attach, tall_adapters
from reflora_dist.engines.find import find_engine
from reflora_dist.engines.pairs import find_pairs
from tests.support.cluster import run_ranks
from tests.support.launchers import REPOSITORY

SHAPE = models.ModelShape(
    hidden_size=48, intermediate_size=80, num_layers=1, num_heads=4, num_key_value_heads=2, vocab_size=64
)


def _record(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    path = folder / "record.json"
    command = [sys.executable, "benchmarks/attach_scale.py", *arguments, "--output", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(path.read_text()), done.stdout


def test_a_short_run_writes_a_record(tmp_path: Path) -> None:
    record, printed = _record(tmp_path, "--model", "small", "--num_layers", "1", "--ranks", "6")
    assert record["benchmark"] == "attach_scale" and record["arguments"]["rank"] == 3
    engines = record["results"]["engines"]
    assert list(engines) == list(attach_scale.ENGINES)
    for engine, figures in engines.items():
        assert figures["layout"] == ("flat" if engine.endswith("-flat") else "tall") and figures["num_pairs"] == 7
        # ten numbers of every rank: nothing else crosses the wire, whatever the model
        assert figures["received_bytes"] == 6 * 10 * 8 == sum(call["bytes"] for call in figures["collectives"])
        assert figures["seconds"] > 0 and figures["grown_bytes"] >= 0
    text = report.markdown(record)
    assert text in printed and "| zero3 | as PEFT stores it | 0.00 |" in text
    assert "of 6 ranks, LLaMA SMALL" in report.headline(record)


def test_70b_on_4096_ranks_stays_within_its_limits(tmp_path: Path) -> None:
    record, _ = _record(tmp_path, "--model", "70b", "--ranks", "4096", "--engines", "zero3", "fsdp2")
    for figures in record["results"]["engines"].values():
        assert figures["layout"] == "tall" and figures["num_pairs"] == 560
        for name, limit in attach_scale.LIMITS.items():
            assert figures[name] <= limit, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4096}, "--rank 4096 is none of 4096"),
        ({"engines": ["zero2"]}, "--engines zero2 unknown"),
        ({"ranks": 0}, "--ranks 0 must be positive"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_scale.Arguments(**change)


# -- every rank is compared


def _differing(original: Callable[..., Any], other: int) -> Callable[..., Any]:
    """An all-gather to which one rank answers something else about its adapters' layout."""

    def all_gather(found: list[torch.Tensor], own: torch.Tensor, **options: Any) -> None:
        original(found, own, **options)
        found[other][-3] += 1

    return all_gather


def _refusal(rank: int, world_size: int, engine: str, other: int) -> str:
    arguments = attach_scale.Arguments(model="70b", num_layers=2, ranks=4096)
    # a text comes from the rank that found it; here that is as good as this rank's
    dist.broadcast_object_list = lambda holder, src: None
    with attach_scale.fake_ranks(2048, 4096):
        model, optimizer = attach_scale.shard(arguments, engine)
        dist.all_gather = _differing(dist.all_gather, other)
        try:
            attach(model, optimizer, attach_scale.CONFIG)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_one_of_4096_ranks_that_disagrees_is_named(engine: str) -> None:
    (message,) = run_ranks(_refusal, 1, engine, 4095, init_process_group=False)
    assert message.startswith("ranks disagree on the layout: rank 0 has [") and "rank 4095 has [" in message


# -- the stand-ins


def _stand_ins_layouts(rank: int, world_size: int, engine: str) -> list[tuple[list[tuple], list[tuple]]]:
    """Layouts and shapes of this rank's parts, for some of five ranks: of ``shard``, and for FSDP2 of fully_shard."""
    views = []
    attach_scale.Arguments.shape = SHAPE  # type: ignore[assignment, method-assign]
    for place in (0, 2, 4):
        with attach_scale.fake_ranks(place, 5):
            model, optimizer = attach_scale.shard(attach_scale.Arguments(ranks=5, rank=place, lora_rank=3), engine)
            found = find_engine(model, optimizer, find_pairs(model))
            shapes = [tuple(weight.shape) for weight in found.weights()]
            expected = _fully_sharded(engine) if engine.startswith("fsdp2") else shapes
            adapters = Adapters.of(SHAPE, 3)
            planned = adapters.layouts(engine.removesuffix("-flat"), 5, engines.stores_tall(engine))
            views.append(([*shapes, *map(tuple, found.layouts())], [*expected, *map(tuple, planned)]))
    return views


def _fully_sharded(engine: str) -> list[tuple]:
    model = meta_adapters(SHAPE, 3)
    if engines.stores_tall(engine):
        tall_adapters(model)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    fully_shard(model, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"), ignored_params=frozen)
    return [tuple(factor.to_local().shape) for pair in find_pairs(model) for factor in (pair.lora_a, pair.lora_b)]


@pytest.mark.parametrize("engine", attach_scale.ENGINES)
def test_the_stand_ins_cut_as_planned(engine: str) -> None:
    (views,) = run_ranks(_stand_ins_layouts, 1, engine, init_process_group=False)
    assert all(found == expected for found, expected in views)


def _real_layouts(rank: int, world_size: int, engine: str) -> list[tuple]:
    workload = TrainingStep(engine, SHAPE, 5, torch.device("cpu"), micro_batch_size=1, seq_len=4)
    return [tuple(layout) for layout in variants.innermost_engine(workload.trainee).layouts()]


@pytest.mark.parametrize("engine", attach_scale.ENGINES)
def test_the_engines_themselves_cut_as_planned(engine: str) -> None:
    planned = Adapters.of(SHAPE, 5).layouts(engine.removesuffix("-flat"), 2, engines.stores_tall(engine))
    assert run_ranks(_real_layouts, 2, engine) == 2 * [[tuple(layout) for layout in planned]]


# -- the count


def _delivered(rank: int, world_size: int) -> list[tuple[str, int]]:
    own = torch.zeros(3, dtype=torch.int64)
    with Deliveries() as deliveries:
        dist.all_gather([torch.empty_like(own) for _ in range(world_size)], own)
        dist.all_reduce(own)
        dist.broadcast(own, src=0)
        dist.barrier()
        dist.all_gather_object([None] * world_size, "x" * 1000)
    return [(call.kind, call.bytes) for call in deliveries.calls]


def test_what_collectives_deliver_is_counted_whoever_calls_them() -> None:
    for calls in run_ranks(_delivered, 2):
        assert [size for _, size in calls[:3]] == [2 * 24, 24, 24] and "allgather" in calls[0][0]
        assert sum(size for _, size in calls[3:]) > 2 * 1000  # of objects, sizes first
