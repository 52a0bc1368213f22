"""finetune.py where ranks share sequences: DeepSpeed's Ulysses, and what is refused there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig

from launchers.training.sequences import check_shared_sequences, ranks_of_a_sequence
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank, launch_environment
from tests.support.launchers import micro_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of one length: gloo, unlike NCCL, gathers tensors of equal sizes alone."""
    folder = tmp_path_factory.mktemp("sequences")
    micro_model(folder / "model")
    rows = [{"instruction": f"say {i % 10}", "input": "", "output": f"one two three {i % 7}"} for i in range(40)]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _by_two(ranks: int) -> dict[str, str]:
    """The variables that the shipped configuration becomes on so many ranks."""
    sizes = f"--num_processes={ranks}", f"--parallelism_config_dp_replicate_size={ranks // 2}"
    environment = launch_environment("deepspeed_zero3_ulysses", *sizes)
    return {name: value for name, value in environment.items() if "PARALLELISM" in name}


def _shared(rank: int, world_size: int, engine: str, argv: list[str]) -> None:
    os.environ.update(_by_two(world_size))
    finetune_rank(rank, world_size, engine, argv)


def _trained(folder: Path, engine: str, ranks: int) -> dict[str, Any]:
    output = f"{engine}-{ranks}"
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    argv = finetune_options(folder, output, **sizes, gradient_accumulation_steps=4, reflora_warmup_steps=1, max_steps=5)
    rank = finetune_rank if engine == "ddp" else _shared
    run_ranks(rank, ranks, engine, argv, timeout=240, init_process_group=False)
    metrics: dict[str, Any] = json.loads((folder / output / "metrics.json").read_text())
    return metrics


@pytest.mark.parametrize("engine", ["zero3", pytest.param("zero2", marks=pytest.mark.all_ranks)])
def test_halves_of_sequences_train_as_whole_ones(folder: Path, engine: str) -> None:
    """Each step sees the same examples: the batches of the ranks of a sequence follow each other.

    On 2 ranks: over gloo the backward of torch's all_gather, by which transformers sums the loss, fails in a group that
    is not all ranks.
    """
    whole, shared = _trained(folder, "ddp", 1), _trained(folder, engine, 2)
    assert shared["report"]["applied_steps"] == whole["report"]["applied_steps"] == 4
    assert shared["report"]["layout"] == "tall" and engine in shared["report"]["engine"]
    for output in ("ddp-1", f"{engine}-2"):
        assert "4 examples per optimizer step" in (folder / output / "run.yaml").read_text()
    for losses in ("train_loss", "held_out_loss"):
        expected = [point["loss"] for point in whole[losses]]
        assert [point["loss"] for point in shared[losses]] == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0]


def _options(ulysses: bool = False, **changes: Any) -> Any:
    config = ParallelismConfig(sp_size=2) if ulysses else ParallelismConfig(cp_size=2)
    training = {"parallelism_config": config, "resume_from_checkpoint": None, "ignore_data_skip": False}
    training |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    asked = {"packing": False, "active": False, "method": "reflora", **changes}
    return SimpleNamespace(
        training=SimpleNamespace(**{name: asked.pop(name, value) for name, value in training.items()}),
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
        ({"ulysses": True, "per_device_train_batch_size": 2}, "set --per_device_train_batch_size 1"),
        ({"ulysses": True, "per_device_eval_batch_size": 8}, "set --per_device_eval_batch_size 1"),
        ({"ulysses": True, "resume_from_checkpoint": "auto"}, "resume_from_checkpoint='auto': .*--ignore_data_skip"),
    ],
)
def test_what_needs_whole_sequences_is_refused(changes: dict[str, Any], message: str) -> None:
    check_shared_sequences(_options(ulysses="ulysses" in changes))
    check_shared_sequences(_options(per_device_train_batch_size=2, resume_from_checkpoint="auto"))
    with pytest.raises(ValueError, match=message):
        check_shared_sequences(_options(**changes))


def test_the_sizes_are_those_that_accelerate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SimpleNamespace(parallelism_config=None)
    assert ranks_of_a_sequence(arguments) == 1
    for name, value in _by_two(4).items():
        monkeypatch.setenv(name, value)
    assert ranks_of_a_sequence(arguments) == 2
    assert ranks_of_a_sequence(SimpleNamespace(parallelism_config=ParallelismConfig())) == 2
