"""What a run leaves is written before steps that may change it or fail: evaluations, and those in another precision."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reflora_dist.checkpoints.complete import last_complete_checkpoint
from tests.support.classification import glue_options, micro_deberta, write_glue
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import micro_model, write_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


def _train(folder: Path, output: str, engine: str = "ddp", **changes: Any) -> dict[str, torch.Tensor]:
    """The adapter that finetune.py leaves; trained once for all tests."""
    if not (folder / output / "metrics.json").exists():
        argv = finetune_options(folder, output, **changes)
        run_ranks(finetune_rank, 2, engine, argv, timeout=240, init_process_group=False)
    return load_file(folder / output / "adapter_model.safetensors")


def _losses(folder: Path, output: str) -> list[float]:
    return [point["loss"] for point in json.loads((folder / output / "metrics.json").read_text())["held_out_loss"]]


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name}: rounding it would not show"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_evaluation_in_16_bits_does_not_round_the_adapter(folder: Path, dtype: str) -> None:
    """Neither the one at the end, which casts the model, nor those in between, after which training goes on."""
    expected = _train(folder, "plain", eval_strategy="no")
    _assert_equal(_train(folder, f"{dtype}-end", eval_strategy="no", **{f"{dtype}_full_eval": True}), expected)
    # the same weights, rounded by up to 2^-9 for bf16
    assert _losses(folder, f"{dtype}-end") == pytest.approx(_losses(folder, "plain"), rel=1e-2)
    assert _losses(folder, f"{dtype}-end") != _losses(folder, "plain")
    changes: dict[str, Any] = {"eval_steps": 2, "save_strategy": "steps", "save_steps": 2, f"{dtype}_full_eval": True}
    _assert_equal(_train(folder, f"{dtype}-between", **changes), expected)
    _assert_equal(load_file(folder / f"{dtype}-between" / "checkpoint-6" / "adapter_model.safetensors"), expected)


@pytest.mark.parametrize("engine", [pytest.param("zero2", marks=pytest.mark.all_ranks), "zero3"])
def test_deepspeed_evaluates_in_what_it_trains_in(folder: Path, engine: str) -> None:
    """With --bf16 nothing is cast; without it transformers would have it train in bf16."""
    output, changes = f"bf16-{engine}", {"bf16": True, "eval_strategy": "no"}
    expected = _train(folder, output, engine, **changes)
    found = _train(folder, f"{output}-end", engine, **changes, bf16_full_eval=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # but rotary frequencies, which are no parameters
    assert _losses(folder, f"{output}-end") == pytest.approx(_losses(folder, output), rel=1e-2)
    with pytest.raises(RuntimeError, match="bf16_full_eval=True: DeepSpeed trains and evaluates in one precision"):
        _train(folder, "refused", engine, bf16_full_eval=True)
    with pytest.raises(RuntimeError, match="fp16_full_eval=True: DeepSpeed trains and evaluates in one precision"):
        _train(folder, "refused", engine, bf16=True, fp16_full_eval=True)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2"])
def test_fsdp_cannot_evaluate_in_another_precision(folder: Path, engine: str) -> None:
    with pytest.raises(RuntimeError, match="bf16_full_eval=True: the parameters that FSDP shards cannot be cast"):
        _train(folder, "refused", engine, bf16_full_eval=True)


def test_further_sets_do_not_round_the_adapter_either(tmp_path: Path) -> None:
    """MNLI's mismatched set is evaluated when training has ended."""
    micro_deberta(tmp_path / "model")
    for name in ("mnli", "mnli-validation"):
        write_glue(tmp_path / f"{name}.jsonl", "mnli", count=12)
    adapters = []
    for full_eval in (False, True):
        output = f"mnli-{full_eval}"
        changes = {"mismatched_dataset": tmp_path / "mnli-validation.jsonl", "bf16_full_eval": full_eval}
        argv = glue_options(tmp_path, "mnli", output, **changes, max_steps=3)
        run_ranks(finetune_rank, 1, "ddp", argv, timeout=170, init_process_group=False)
        adapters.append(load_file(tmp_path / output / "adapter_model.safetensors"))
        recorded = json.loads((tmp_path / output / "metrics.json").read_text())["held_out_metrics"]
        sets = [(point["set"], point["step"]) for point in recorded]
        assert sets == [("validation", 0), ("validation", 3), ("mismatched", 3)]
    _assert_equal(adapters[1], adapters[0])


def _fail_to_evaluate(rank: int, world_size: int, argv: list[str]) -> None:
    from launchers import finetune

    def evaluate(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory (a test's)")

    finetune.Trainer.evaluate = evaluate  # type: ignore[method-assign]
    finetune.main(argv)


def test_an_evaluation_that_fails_at_the_end_leaves_the_adapter(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run_ranks(
            _fail_to_evaluate, 1, finetune_options(folder, "failed", eval_strategy="no"), init_process_group=False
        )
    assert len(load_file(folder / "failed" / "adapter_model.safetensors")) == 28
    assert not (folder / "failed" / "metrics.json").exists()  # by which recipes see that a run has ended


def _stopped(rank: int, world_size: int, argv: list[str], step: int) -> list[str]:
    """The evaluations of a run that is told to stop in that step."""
    from launchers import finetune

    stop, evaluated = finetune.StopOnSignal(), []
    finetune.StopOnSignal = lambda: stop  # type: ignore[assignment, misc]

    def on_step_begin(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGUSR1)
            while stop._received is None:  # a thread takes it
                time.sleep(0.01)

    def on_evaluate(callback: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        evaluated.append(f"{state.global_step}")

    finetune.EvaluationsToCome.on_step_begin = on_step_begin  # type: ignore[method-assign]
    finetune.EvaluationsToCome.on_evaluate = on_evaluate  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        finetune.main(argv)
    assert ended.value.code == 128 + signal.SIGUSR1
    return evaluated


@pytest.mark.parametrize(
    "changes",
    [
        {"save_strategy": "best", "metric_for_best_model": "loss", "eval_steps": 2},
        {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "epoch"},
        {"save_strategy": "steps", "save_steps": 100, "eval_steps": 2},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
    ],
    ids=["best-steps", "best-epoch", "steps", "epoch"],
)
def test_a_run_that_is_stopped_saves_and_does_not_evaluate_first(tmp_path: Path, folder: Path, changes: Any) -> None:
    """An evaluation may take longer than a scheduler waits, and would decide whether this checkpoint is the best."""
    output = tmp_path / "stopped"
    argv = finetune_options(folder, str(output), **changes, max_steps=20)
    (evaluated,) = run_ranks(_stopped, 1, argv, 4, timeout=170, init_process_group=False)
    assert evaluated == (["0", "2"] if "eval_steps" in changes else ["0"])
    assert Path(last_complete_checkpoint(output) or "").name == "checkpoint-4"
