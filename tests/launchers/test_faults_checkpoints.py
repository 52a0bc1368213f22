"""Which of a run's checkpoints is taken: the last that is whole, and never one that was cut short."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launchers.training.used_folder import checkpoint_to_resume
from reflora_dist.checkpoints.complete import last_complete_checkpoint, require_complete
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_rank, resumable_options
from tests.support.launchers import micro_model, write_records

STEPS = 6
KINDS = ["adapter_model.safetensors", "*_optim_states.pt", "rng_state_1.pth", "trainer_state.json", "complete.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two ranks under ZeRO-3, and the adapter at the end of the run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    _run(folder, folder / "run")
    return folder


def _run(folder: Path, output: Path, **changes: Any) -> None:
    argv = resumable_options(folder, output, max_steps=STEPS, save_total_limit=2, **changes)
    run_ranks(finetune_rank, 2, "zero3", argv, timeout=240, init_process_group=False)


def _truncated(folder: Path, tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A copy of the run whose last checkpoint has half a file of that kind; the copy and the file."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    file = sorted((run / f"checkpoint-{STEPS}").rglob(kind))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return run, file


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_checkpoint_is_refused_by_name_and_passed_over(
    folder: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked for by name: an error before training that names the file. Not by name: the one before, with a warning."""
    run, file = _truncated(folder, tmp_path, kind)
    with pytest.raises(ValueError, match=rf"checkpoint-6.*{file.name} (has \d+ bytes instead of \d+|cannot be read)"):
        checkpoint_to_resume(_arguments(run, str(file.parents[len(file.relative_to(run).parts) - 2])))
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(_arguments(run, "auto")) == str(run / "checkpoint-3")
    assert f"passing over a checkpoint: {file}" in caplog.text


def _arguments(output_dir: Path, asked: str) -> Any:
    return SimpleNamespace(output_dir=str(output_dir), resume_from_checkpoint=asked)


def test_a_checkpoint_without_its_record_is_none(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "checkpoint-6" / "complete.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-6 is no complete checkpoint: complete\.json"):
        require_complete(run / "checkpoint-6")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-3")
    shutil.rmtree(run / "checkpoint-3")
    assert last_complete_checkpoint(run) is None


def test_work_that_was_done_from_an_earlier_checkpoint_counts(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    record = run / "checkpoint-3" / "complete.json"
    written = json.loads((run / "checkpoint-6" / "complete.json").read_text())["time"]
    for time, last in ((written - 1, "6"), (written, "6"), (written + 1, "3")):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"time": time}))
        assert last_complete_checkpoint(run) == str(run / f"checkpoint-{last}")
    assert "checkpoint-3 was written after checkpoint-6" in caplog.text
    record.write_text(json.dumps(json.loads(record.read_text()) | {"time": None}))  # an earlier release has none
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


def test_files_that_a_conversion_adds_are_no_damage(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    (run / "checkpoint-6" / "latest_universal").write_text("global_step6_universal")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


def test_a_resumed_run_passes_over_a_truncated_checkpoint_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    """Resumed with ``auto`` on two ranks from checkpoint 3, it writes checkpoint 6 again, whole."""
    run, _ = _truncated(folder, tmp_path, KINDS[1])
    _run(folder, run, resume_from_checkpoint="auto")
    assert len(json.loads((run / "metrics.json").read_text())["train_loss"]) == STEPS
    require_complete(run / "checkpoint-6")
    expected = load_file(folder / "run" / "adapter_model.safetensors")
    resumed = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_what_is_written_over_a_checkpoint_is_none_until_it_is_whole(folder: Path, tmp_path: Path) -> None:
    """A run that goes on from an earlier checkpoint dies while it writes the next one again: the old record does not
    vouch for a mixture of both."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    argv = resumable_options(folder, run, max_steps=STEPS, resume_from_checkpoint=run / "checkpoint-3")
    with pytest.raises(RuntimeError, match="killed while saving"):
        run_ranks(_die_while_saving, 2, argv, init_process_group=False)
    assert not (run / "checkpoint-6" / "complete.json").exists()
    require_complete(run / "checkpoint-3")


def _die_while_saving(rank: int, world_size: int, argv: list[str]) -> None:
    from transformers import Trainer

    def die(*args: Any) -> None:
        raise RuntimeError("killed while saving")

    Trainer._save_rng_state = die  # type: ignore[method-assign]
    finetune_rank(rank, world_size, "zero3", argv)
