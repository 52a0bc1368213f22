"""Records that scripts read back: refused by name where they are damaged, whatever JSON is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launchers.compare import load_run
from launchers.data.records import load_records
from launchers.evaluation.answer_files import check_settings, read_answers
from launchers.training.options import DataOptions, LoraOptions
from launchers.training.recorded import recorded_template
from reflora_dist import LoRARite, RefLoRAConfig
from reflora_dist.checkpoints.complete import last_complete_checkpoint, require_complete
from reflora_dist.files.records import file_sizes, write_json
from reflora_dist.lora_sb import LoRASBConfig

_FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]


def _checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    for name in _FILES[1:4]:
        torch.save({"x": torch.ones(2)}, folder / name)
    save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
    write_json(folder / "complete.json", {"files": file_sizes(folder)})
    return folder


@pytest.mark.parametrize("name", _FILES)
def test_a_zeroed_file_of_a_trainers_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    """It has its size, which the record knows; the one before is taken."""
    good, bad = _checkpoint(tmp_path / "checkpoint-1"), _checkpoint(tmp_path / "checkpoint-2")
    require_complete(bad)
    (bad / name).write_bytes(bytes((bad / name).stat().st_size))
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} .*earlier"):
        require_complete(bad)
    assert last_complete_checkpoint(tmp_path) == str(good)


_RUN = {
    "method": "lora",
    "settings": {},
    "report": {"engine": "ddp"},
    "train_loss": [],
    "held_out_loss": [{"step": 0, "loss": 1.5}],
    "world_size": 1,
    "step_seconds_median": 0.1,
    "bytes_per_step": 0,
    "peak_memory_bytes": 1,
    "peak_memory_kind": "x",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": 3}, "method is 3"),
        ({"settings": []}, r"settings is \[\]"),
        ({"report": {}}, "report is damaged .engine is missing"),
        ({"held_out_loss": [{"step": "x", "loss": 1.0}]}, "held_out_loss is damaged .step is 'x'"),
        ({"step_seconds_median": "x"}, "step_seconds_median is 'x'"),
    ],
)
def test_a_runs_metrics(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(_RUN))
    assert load_run(tmp_path)["held_out_loss"] == [{"step": 0, "loss": 1.5}]
    path.write_text(json.dumps({**_RUN, **change}))
    with pytest.raises(ValueError, match=rf"metrics\.json.*{message}.*give the output_dir of a finished run"):
        load_run(tmp_path)


@pytest.mark.parametrize("settings", [3, {"prompt_template": "x"}, {"prompt_template": []}])
def test_a_recorded_template(settings: Any, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"settings": {"prompt_template": "alpaca"}}))
    assert recorded_template(str(tmp_path)) == "alpaca"
    path.write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match=r"metrics\.json .*give --prompt_template"):
        recorded_template(str(tmp_path))


@pytest.mark.parametrize(
    "line", ["3", "[]", '{"task": "boolq", "index": 0}', '{"task": [], "index": 0}', "[" * 100_000]
)
def test_an_answer(line: str, tmp_path: Path) -> None:
    good = {"task": "boolq", "index": 0, "answer": None, "correct": False}
    path = tmp_path / "answers.rank0.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert read_answers(tmp_path) == {("boolq", 0): good}
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"answers\.rank0\.jsonl, line 1.*delete the file"):
        read_answers(tmp_path)


def test_the_settings_of_answers(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings\.json holds \[\] .*give another --output_dir"):
        check_settings(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "the record is nested too deeply"),
        ('{"a": ' * 100_000, "field 'a' is nested too deeply"),
        (f'{{"instruction": {"1" * 5000}}}', "field 'instruction' is an integer of 5,000 digits"),
    ],
)
def test_records_that_json_cannot_take(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"records\.jsonl, line 1: {message}"):
        load_records([str(tmp_path / "records.jsonl")])


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (RefLoRAConfig, {"method": "scaled-gd", "damping": 10**400}),
        (RefLoRAConfig, {"method": "scaled-gd", "damping": True}),
        (LoRASBConfig, {"num_batches": "8"}),
        (LoRASBConfig, {"learning_rate": float("nan")}),
        (LoRASBConfig, {"learning_rate": float("inf")}),
        (LoRASBConfig, {"power_iterations": None}),
        (LoRASBConfig, {"seed": 0.5}),
        (LoraOptions, {"lora_alpha": float("nan")}),
        (LoraOptions, {"lora_alpha": 0.0}),
        (LoraOptions, {"method": "lora-sb", "lora_sb_learning_rate": float("inf")}),
        (DataOptions, {"pretrain_steps": 0}),
        (lambda **settings: LoRARite([torch.zeros(1)], **settings), {"lr": float("inf")}),
        (lambda **settings: LoRARite([torch.zeros(1)], **settings), {"eps": 10**400}),
        (lambda **settings: LoRARite([torch.zeros(1)], **settings), {"betas": ("x", 0.5)}),
        (lambda **settings: LoRARite([torch.zeros(1)], **settings), {"apply_escape": 2}),
    ],
)
def test_a_number_that_is_none_or_not_finite(make: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(settings)[-1]}="):
        make(**settings)
