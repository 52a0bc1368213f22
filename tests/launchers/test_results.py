"""A run's results: the best model's, of this run, whole or not there, and in place of nobody else's files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launchers import finetune
from launchers.training.recorded import recorded_template
from launchers.training.used_folder import RESTARTED
from reflora_dist.checkpoints.complete import require_complete
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import micro_model, write_records

EVERY_STEP: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_steps": 1,
    "max_steps": 4,
    "save_total_limit": 0,
}
ENGINES = [
    "single",
    *(pytest.param(name, marks=pytest.mark.all_ranks) for name in ("fsdp1", "fsdp2", "zero2", "zero3")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


class Killed(Exception):
    pass


def _rank(rank: int, world_size: int, engine: str, argv: list[str], killed: bool, restarted: bool) -> str:
    def kill(*args: Any) -> None:
        raise Killed("before the results")

    if killed:
        finetune.finish = kill
    if restarted:
        os.environ |= {RESTARTED: "1", "SLURM_JOB_ID": "7"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        finetune_rank(rank, world_size, engine, argv)
    return printed.getvalue()


def _train(
    folder: Path, output: Path, engine: str = "single", killed: bool = False, restarted: bool = False, **changes: Any
) -> str:
    """Run finetune.py, perhaps killed between its last checkpoint and its results; return what rank 0 printed."""
    argv = finetune_options(folder, str(output), **{**EVERY_STEP, **changes})
    with pytest.raises(RuntimeError, match="before the results") if killed else contextlib.nullcontext():
        return run_ranks(
            _rank, 1 if engine == "single" else 2, engine, argv, killed, restarted, timeout=240,
            init_process_group=False,
        )[0]  # fmt: skip
    return ""


def _equal(one: Path, other: Path) -> bool:
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_was_killed_before_its_results_exports_the_best_model(
    folder: Path, tmp_path: Path, engine: str
) -> None:
    changes = {"load_best_model_at_end": True, "greater_is_better": True}  # the first one
    run, whole = tmp_path / "run", tmp_path / "whole"
    _train(folder, whole, engine, **changes)
    history = json.loads((whole / "checkpoint-4" / "trainer_state.json").read_text())
    assert not history["best_model_checkpoint"].endswith("checkpoint-4")
    _train(folder, run, engine, killed=True, **changes)
    assert "nothing is trained" in _train(folder, run, engine, resume_from_checkpoint="auto", **changes)
    assert _equal(run, whole)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_the_last_checkpoint_may_be_the_best_one(folder: Path, tmp_path: Path, engine: str, save_strategy: str) -> None:
    """Trainer itself misses it where the engine makes its folder late."""
    changes = {"load_best_model_at_end": True, "greater_is_better": False, "save_strategy": save_strategy}
    _train(folder, tmp_path, engine, **changes)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 4 and state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    require_complete(tmp_path / "checkpoint-4")
    assert _equal(tmp_path, tmp_path / "checkpoint-4") or engine == "fsdp1"  # whose checkpoint has no adapter's file


def test_results_of_an_earlier_run_do_not_pass_for_this_ones(folder: Path, tmp_path: Path) -> None:
    _train(folder, tmp_path)
    changes = {"learning_rate": 1e-3, "prompt_template": "none"}
    _train(folder, tmp_path, killed=True, overwrite_output_dir=True, **changes)
    assert recorded_template(str(tmp_path / "checkpoint-4")) == "none"
    assert recorded_template(str(tmp_path)) is None  # the adapter is still the first run's
    assert "the results follow" in _train(folder, tmp_path, resume_from_checkpoint="auto", **changes)
    assert _equal(tmp_path, tmp_path / "checkpoint-4")
    assert json.loads((tmp_path / "metrics.json").read_text())["settings"]["learning_rate"] == 1e-3
    earlier = {"resume_from_checkpoint": tmp_path / "checkpoint-2", **changes, "learning_rate": 1e-4}
    _train(folder, tmp_path, killed=True, **earlier)
    earlier["resume_from_checkpoint"] = "auto"
    assert "the results follow" in _train(folder, tmp_path, **earlier)
    assert _equal(tmp_path, tmp_path / "checkpoint-4")
    (tmp_path / "metrics.json").write_text('{"steps": 4, "sett')  # the disk was full
    assert "the results follow" in _train(folder, tmp_path, **earlier)
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 4


def test_a_checkpoint_without_the_optimizers_state_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    _train(folder, tmp_path, save_only_model=True)
    assert "nothing is trained" in _train(folder, tmp_path, save_only_model=True, resume_from_checkpoint="auto")
    for asked in ("auto", tmp_path / "checkpoint-2"):
        argv = finetune_options(folder, str(tmp_path), **{**EVERY_STEP, "max_steps": 6}, resume_from_checkpoint=asked)
        with pytest.raises(SystemExit, match=r"saved with --save_only_model .*start a new one from its adapter"):
            finetune.main(argv)


@pytest.mark.parametrize("name", ["README.md", "run.yaml", "metrics.json", "loss.png", "adapter_model.safetensors"])
def test_files_that_no_run_wrote_are_not_replaced(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit, match=rf"has {name}, which this run would replace, and no run\.yaml of an earlier"):
        finetune.main(finetune_options(folder, str(tmp_path), model="absent"))
    assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(SystemExit, match="absent"):
        finetune.main(finetune_options(folder, str(tmp_path), model="absent", overwrite_output_dir=True))
    assert (tmp_path / name).read_text() == "mine"  # which a run that cannot start does not touch either


def test_a_job_that_is_queued_again_goes_on_from_its_own_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Its options are still those of the first start, from a checkpoint of another folder."""
    first, job = tmp_path / "first", tmp_path / "job"
    _train(folder, first)
    asked = {"resume_from_checkpoint": first / "checkpoint-2", "max_steps": 6}
    assert f"going on from {first / 'checkpoint-2'}" in _train(folder, job, restarted=True, **asked)
    shutil.rmtree(job / "checkpoint-6")
    (job / "checkpoint-5" / "complete.json").unlink()  # the job died while it wrote this one
    assert f"going on from {job / 'checkpoint-4'}" in _train(folder, job, restarted=True, **asked)
    again = _train(folder, job, restarted=True, max_steps=7, overwrite_output_dir=True)
    assert f"going on from {job / 'checkpoint-6'}" in again and "removing" not in again
    # one that died before its first checkpoint begins as it was asked to, also in a folder with those of another job
    asked["resume_from_checkpoint"] = first / "checkpoint-2"
    assert f"going on from {first / 'checkpoint-2'}" in _train(folder, first, restarted=True, **asked)
    assert "removing" in _train(folder, first.rename(tmp_path / "other"), restarted=False, overwrite_output_dir=True)
