"""What FSDP2 gathers of lora_A: padded to a row per rank as PEFT stores it, and its size if it is tall."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import fsdp2_gathers
from benchmarks.harness import models
from benchmarks.harness.deliveries import Deliveries
from benchmarks.harness.workloads import TrainingStep
from benchmarks.reports import fsdp2_gathers as report
from tests.support.benchmark_runs import record_of
from tests.support.cluster import run_ranks


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return record_of("fsdp2_gathers", tmp_path_factory.mktemp("gathers"), 4, ["--lora_ranks", "2", "4"])


def test_two_rows_on_four_ranks_travel_twice_unless_they_are_stored_tall(record: dict[str, Any]) -> None:
    assert record["world_size"] == 4 and record["benchmark"] == "fsdp2_gathers"
    ratios = {(row["lora_rank"], row["tall"]): row["ratio"] for row in record["results"]["rows"]}
    assert ratios == {(2, False): 2.0, (2, True): 1.0, (4, False): 1.0, (4, True): 1.0}
    text = report.markdown(record)
    assert "| 2 | as PEFT stores it | 8,896 | 17,792 | 2.00 |" in text and "| 2 | tall | 8,896 | 8,896 | 1.00 |" in text


def _gathered(rank: int, world_size: int, engine: str) -> int:
    """Elements that a forward gathers of a model that is sharded layer by layer, as users do."""
    shape = models.ModelShape(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_key_value_heads=2, vocab_size=64
    )
    workload = TrainingStep(engine, shape, 2, torch.device("cpu"), micro_batch_size=1, seq_len=4)
    with Deliveries() as deliveries:
        workload.trainee.model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    return sum(call.numel for call in deliveries.calls)


def test_in_whole_layers_the_padding_is_all_that_differs() -> None:
    (tall, *_), (flat, *_) = (run_ranks(_gathered, 4, engine) for engine in ("fsdp2", "fsdp2-flat"))
    assert flat - tall == 2 * 2 * (6 * 64 + 96)  # two layers, two rows of padding of every lora_A


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": "9b"}, "--model 9b is unknown"), ({"lora_ranks": []}, "--lora_ranks"), ({"num_layers": 0}, "positive")],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fsdp2_gathers.Arguments(**change)
