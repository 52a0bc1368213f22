"""finetune.py where ranks share sequences: DeepSpeed's Ulysses, and what is refused there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig

from launchers.training.sequences import check_shared_sequences, ranks_of_a_sequence
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import REPOSITORY, micro_model

EXAMPLE = (REPOSITORY / "launchers" / "examples" / "zero3_ulysses.yaml").read_text()
BY_TWO = dict(re.findall(r"([A-Z_]+)=(\S+)", EXAMPLE))  # the variables of the shipped example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of one length: gloo, unlike NCCL, gathers tensors of equal sizes alone."""
    folder = tmp_path_factory.mktemp("sequences")
    micro_model(folder / "model")
    rows = [{"instruction": f"say {i % 10}", "input": "", "output": f"one two three {i % 7}"} for i in range(40)]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _shared(rank: int, world_size: int, engine: str, argv: list[str]) -> None:
    os.environ.update(BY_TWO)
    finetune_rank(rank, world_size, engine, argv)


def _trained(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    alone = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "reflora_warmup_steps": 1, **changes}
    argv = finetune_options(folder, output, **alone)
    if output == "whole":
        run_ranks(finetune_rank, 1, "ddp", argv, timeout=240, init_process_group=False)
    else:
        run_ranks(_shared, 2, output, argv, timeout=240, init_process_group=False)
    metrics: dict[str, Any] = json.loads((folder / output / "metrics.json").read_text())
    return metrics


@pytest.mark.parametrize("engine", ["zero3", pytest.param("zero2", marks=pytest.mark.all_ranks)])
def test_halves_of_sequences_train_as_whole_ones(folder: Path, engine: str) -> None:
    whole, shared = _trained(folder, "whole"), _trained(folder, engine)
    assert shared["report"]["applied_steps"] == whole["report"]["applied_steps"] == 5
    assert shared["report"]["layout"] == "tall" and engine in shared["report"]["engine"]
    for losses in ("train_loss", "held_out_loss"):
        expected = [point["loss"] for point in whole[losses]]
        assert [point["loss"] for point in shared[losses]] == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0]


def _options(**changes: Any) -> Any:
    asked = {"packing": False, "active": False, "method": "reflora", **changes}
    return SimpleNamespace(
        training=SimpleNamespace(parallelism_config=ParallelismConfig(cp_size=2)),
        data=SimpleNamespace(packing=asked["packing"]),
        classification=SimpleNamespace(active=asked["active"]),
        lora=SimpleNamespace(method=asked["method"]),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, "packing=True: 2 ranks share each sequence"),
        ({"active": True}, "task=seq-cls: 2 ranks share each sequence"),
        ({"method": "lora-sb"}, "method='lora-sb': 2 ranks share each sequence"),
    ],
)
def test_what_needs_whole_sequences_is_refused(changes: dict[str, Any], message: str) -> None:
    check_shared_sequences(_options())
    with pytest.raises(ValueError, match=message):
        check_shared_sequences(_options(**changes))


def test_the_sizes_are_those_that_accelerate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SimpleNamespace(parallelism_config=None)
    assert ranks_of_a_sequence(arguments) == 1
    for name, value in BY_TWO.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_a_sequence(arguments) == 2
    assert ranks_of_a_sequence(SimpleNamespace(parallelism_config=ParallelismConfig())) == 2
