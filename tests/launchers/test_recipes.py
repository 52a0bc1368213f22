"""The recipes of the papers' tables as a user starts them, scaled down: micro models, a few records, two ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.classification import micro_deberta, write_glue
from tests.support.launchers import DATA, REPOSITORY, launch, micro_model, needs_data

LAUNCHERS = REPOSITORY / "launchers"
TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")


def _commonsense_files(root: Path) -> None:
    """The tree that is downloaded: a few real questions of each task. HellaSwag's file is no part of the local data."""
    train: list[dict[str, str]] = []
    for task in TASKS:
        if task == "hellaswag":
            form = "\n\nEnding1: sings. Ending2: drums. Ending3: rests. Ending4: leaves.\n\nAnswer format: ending1/..."
            records = [{"instruction": f"{i} drummers{form}", "input": "", "answer": "ending2"} for i in range(20)]
            records = [{**record, "output": f"the correct answer is {record['answer']}"} for record in records]
        else:
            records = json.loads((DATA / "commonsense" / task / "test.json").read_text())[:20]
        path = root / "dataset" / task / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(records))
        train += [record for record in records if len(record["instruction"]) < 220]
    (root / "ft-training_set").mkdir()
    (root / "ft-training_set" / "commonsense_170k.json").write_text(json.dumps(train))


@needs_data
@pytest.mark.all_ranks
def test_commonsense_trains_and_evaluates(tmp_path: Path) -> None:
    """The whole script on two ranks of ZeRO-3, with data "downloaded" from files; then started once more."""
    micro_model(tmp_path / "model")
    _commonsense_files(tmp_path / "files")
    command = [
        "bash",
        LAUNCHERS / "recipes" / "commonsense.sh",
        "llama2-7b",
        "--weights",
        tmp_path / "model",
        "--lora-r",
        "4",
    ]
    command += ["--output-dir", tmp_path / "out", "--processes", "2", "--evaluate-options", "--limit 1"]
    command += ["--", "--bf16", "False", "--max_steps", "6", "--reflora_warmup_steps", "2", "--warmup_steps", "1"]
    command += ["--eval_steps", "2", "--save_steps", "2", "--max_length", "640", "--learning_rate", "1e-2"]
    command += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "1"]
    environment = {"REFLORA_CACHE": str(tmp_path / "cache"), "LLM_ADAPTERS_URL": (tmp_path / "files").as_uri()}
    printed = launch(command, timeout_s=400, **environment)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["report"]["engine"], metrics["world_size"]) == ("zero3", 2)
    assert (metrics["steps"], metrics["report"]["applied_steps"], metrics["report"]["num_pairs"]) == (6, 4, 10)
    settings = metrics["settings"]
    assert (settings["lora_alpha"], settings["lora_dropout"], settings["prompt_template"]) == (8, 0.05, "alpaca")
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 20
    results = json.loads((tmp_path / "out" / "commonsense" / "results.json").read_text())
    assert {task: entry["n"] for task, entry in results["tasks"].items()} == dict.fromkeys(TASKS, 1)
    assert (results["settings"]["num_beams"], results["world_size"]) == (4, 2)
    assert results["settings"]["prompt_template"] == "alpaca"
    assert re.search(r"mean of the commonsense tasks", printed)
    assert printed.count("Downloading") == 9
    again = launch(command, timeout_s=200, **environment)
    assert "not trained again" in again and "8 of 8 questions are answered already" in again
    assert "Downloading" not in again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give llama-7b, llama2-7b or llama3-8b"),
        (["llama-13b"], "'llama-13b': give llama-7b"),
        (["llama-7b", "--max_steps", "3"], "put options of finetune.py behind --"),
        (["llama-7b", "--engine", "ddp"], "give zero3 or fsdp2"),
        (["llama-7b", "--lora-r", "big"], "whole number"),
        (["llama-7b", "--lora-r"], "needs a value"),
        (["llama-7b", "--processes", "3"], "do not divide the batch of 16"),
    ],
)
def test_commonsense_names_a_mistake(options: list[str], message: str) -> None:
    printed = launch(["bash", LAUNCHERS / "recipes" / "commonsense.sh", *options], timeout_s=120, expect_failure=True)
    assert message in printed


@pytest.mark.parametrize(
    ("task", "engine"), [("cola", "ddp"), pytest.param("mnli", "zero3", marks=pytest.mark.all_ranks)]
)
def test_glue_trains_and_scores(tmp_path: Path, task: str, engine: str) -> None:
    micro_deberta(tmp_path / "model")
    train, validation = write_glue(tmp_path / "train.jsonl", task), write_glue(tmp_path / "validation.jsonl", task)
    command = ["bash", LAUNCHERS / "recipes" / "glue.sh", task, "--engine", engine, "--weights", tmp_path / "model"]
    command += ["--train-data", train, "--eval-data", validation, "--output-dir", tmp_path / "out", "--processes", "2"]
    command += ["--", "--num_train_epochs", "3", "--reflora_warmup_steps", "2", "--warmup_steps", "1"]
    command += ["--cache_dir", tmp_path / "cache"]
    printed = launch(command, timeout_s=300)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # 48 records are 2 batches of 32 (16 on a rank)
    assert (metrics["report"]["engine"], metrics["steps"], metrics["report"]["applied_steps"]) == (engine, 6, 4)
    name = "matthews_correlation" if task == "cola" else "accuracy"
    assert [(point["step"], point["set"]) for point in metrics["held_out_metrics"]] == [
        (step, "validation") for step in (0, 2, 4, 6)
    ]
    last = metrics["held_out_metrics"][-1]
    assert f"validation, step 6: {name} {last[name]:.4f}" in printed
    published = {"cola": (1e-3, 0.15, 64), "mnli": (5e-4, 0.15, 256)}[task]
    settings = metrics["settings"]
    assert (settings["learning_rate"], settings["cls_dropout"], settings["max_length"]) == published
    assert (settings["lora_r"], settings["lora_alpha"], settings["per_device_train_batch_size"]) == (8, 8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give cola, sst2"),
        (["wnli"], "'wnli': give cola"),
        (["rte", "--epochs", "3"], "put options of finetune.py behind --"),
        (["rte", "--engine", "fsdp2"], "give ddp or zero3"),
        (["rte", "--seed"], "needs a value"),
        (["rte", "--processes", "5"], "do not divide the batch of 32"),
    ],
)
def test_glue_names_a_mistake(options: list[str], message: str) -> None:
    printed = launch(["bash", LAUNCHERS / "recipes" / "glue.sh", *options], timeout_s=120, expect_failure=True)
    assert message in printed
