"""``--model smollm2`` in every script, with a micro model in SmolLM2's place in the cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.harness.models import SHAPES, shape_of
from benchmarks.sweep.data import prepare
from launchers import ask, evaluate, export, finetune
from reflora_dist.doctor.base_model import load_config
from reflora_dist.files import smollm2
from reflora_dist.files.base_files import load_tokenizer
from tests.support.finetune import finetune_options
from tests.support.launchers import micro_model, write_questions, write_records


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds a micro model as SmolLM2."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "_build", micro_model)
        patch.setattr(smollm2, "_in_hub_cache", lambda: None)
        patch.setattr(smollm2, "is_offline_mode", lambda: True)
        smollm2.resolve_model("smollm2", folder)
    return folder


@pytest.fixture(autouse=True)
def default_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFLORA_CACHE", str(cache))
    monkeypatch.setattr(smollm2, "_in_hub_cache", lambda: None)
    monkeypatch.setattr(smollm2, "_from_hub", lambda: pytest.fail("asked the hub"))


@pytest.fixture
def adapter(cache: Path, tmp_path: Path) -> Path:
    """An adapter that names no folder of the model, so that --model has to."""
    base = AutoModelForCausalLM.from_pretrained(smollm2.resolve_model("smollm2", cache))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = "smollm2"
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_finetune_trains_it(cache: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "records.jsonl")
    finetune.main(finetune_options(tmp_path, "output", model="smollm2", cache_dir=cache, max_steps=3))
    base = PeftConfig.from_pretrained(tmp_path / "output").base_model_name_or_path
    assert base == smollm2.resolve_model("smollm2", cache)  # which plain PEFT finds
    assert f"base_model: {smollm2.HUB_NAME}" in (tmp_path / "output" / "README.md").read_text()


def test_evaluate_answers_with_it(tmp_path: Path) -> None:
    write_questions(tmp_path / "data")
    options = ["--model=smollm2", f"--data={tmp_path / 'data'}", "--tasks", "boolq", "--limit=2", "--max_new_tokens=2"]
    evaluate.main([*options, f"--output_dir={tmp_path / 'answers'}"])
    assert (tmp_path / "answers" / "results.json").is_file()


def test_export_merges_into_it(adapter: Path, tmp_path: Path) -> None:
    options = [f"--adapter={adapter}", "--merge=True", "--model=smollm2", f"--output_dir={tmp_path / 'merged'}"]
    export.main(options)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0
    assert load_tokenizer(str(tmp_path / "merged")).eos_token_id is not None


def test_ask_puts_questions_to_it_and_to_an_adapter(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = write_records(adapter.parent / "records.jsonl", count=3)
    options = ["--adapter", str(adapter), "--base", "--model", "smollm2", "--records", str(records), "--count", "2"]
    monkeypatch.setattr(sys, "argv", ["ask.py", *options, "--max_new_tokens", "3"])
    ask.main()
    printed = capsys.readouterr().out.splitlines()
    starts = ["Q: What does the function item_0 do?", "   the base ", "   adapter ", "   reference "]
    assert len([line for line in printed if line.startswith("Q: ")]) == 2
    for start in starts[1:]:
        assert len([line for line in printed if line.startswith(start)]) == 2
    assert printed[0] == starts[0]
    assert [line for line in printed if line.endswith("Return the number 0 of the container.")]


def test_the_doctor_and_the_benchmarks_know_it(cache: Path, tmp_path: Path) -> None:
    assert load_config("smollm2").hidden_size == 32
    records = write_records(tmp_path / "records.jsonl")
    limits = {"max_length": 64, "max_eval_records": 4, "eval_fraction": 0.2}
    material = prepare("smollm2", [str(records)], [], cache_dir=cache, **limits)
    assert material.model == Path(smollm2.resolve_model("smollm2", cache)) and len(material.held_out) == 2
    shape = shape_of("smollm2", None)
    assert "smollm2" in SHAPES and shape.hidden_size == shape.num_heads * 64
