"""finetune.py --task seq-cls: a small DeBERTa on records with GLUE's fields, every task, under DDP and sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

from launchers import finetune
from launchers.training import classification
from launchers.training.glue_tasks import GLUE, ClassificationOptions
from launchers.training.options import parse_options
from tests.support.classification import LAYERS, glue_options, micro_deberta, write_glue
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_rank

# The papers' adapted layers: five kinds in each layer, and output.dense twice.
PAIRS = 6 * LAYERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    micro_deberta(folder / "model")
    for task in GLUE:
        write_glue(folder / f"{task}.jsonl", task)
        write_glue(folder / f"{task}-validation.jsonl", task, count=25, seed=1)
    return folder


def _run(folder: Path, task: str, engine: str, output: str, **changes: Any) -> dict[str, Any]:
    argv = glue_options(folder, task, output, **changes)
    run_ranks(finetune_rank, 2, engine, argv, timeout=240, init_process_group=False)
    return json.loads((folder / output / "metrics.json").read_text())


_SAMPLED = {("mrpc", "ddp"), ("stsb", "zero3"), ("mnli", "fsdp2")}


@pytest.mark.parametrize(
    ("task", "engine"),
    [
        pytest.param(task, engine, marks=[] if (task, engine) in _SAMPLED else [pytest.mark.all_ranks])
        for engine in ("ddp", "zero2", "zero3", "fsdp1", "fsdp2")
        for task in (GLUE if engine == "ddp" else ("cola", "stsb", "mnli"))
    ],
)
def test_every_task_trains_and_is_scored(folder: Path, task: str, engine: str) -> None:
    output = f"{task}-{engine}"
    more = {"mismatched_dataset": folder / "mnli-validation.jsonl"} if task == "mnli" else {}
    metrics = _run(folder, task, engine, output, **more)
    report = metrics["report"]
    assert engine in report["engine"] and (report["num_pairs"], report["applied_steps"]) == (PAIRS, 4)
    assert report["skipped_pairs"] == 0
    points = metrics["held_out_metrics"]
    expected = [("validation", 0), ("validation", 3), ("validation", 6)] + [("mismatched", 6)] * (task == "mnli")
    assert [(point["set"], point["step"]) for point in points] == expected
    assert all(set(point) == {"step", "set", *GLUE[task].metrics} for point in points)
    assert metrics["settings"]["glue_task"] == task
    assert [point["step"] for point in metrics["held_out_loss"]] == [0, 3, 6]
    losses = [point["loss"] for point in metrics["train_loss"]]
    assert all(np.isfinite(losses)) and len(losses) == 6
    _check_saved(folder, task, folder / output, points[-1])


def _check_saved(folder: Path, task: str, adapter: Path, last: dict[str, Any]) -> None:
    """PEFT loads it, the new layers were trained, and it scores what was recorded, in one process without a Trainer."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    heads = {name.split(".model.")[1] for name in tensors if "lora_" not in name}
    assert heads == {"classifier.weight", "classifier.bias", "pooler.dense.weight", "pooler.dense.bias"}
    assert sum("lora_" in name for name in tensors) == 2 * PAIRS
    assert all(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_" in name)
    for name, tensor in tensors.items():
        if name.endswith((".bias", "pooler.dense.bias")):  # which start at zero
            assert tensor.abs().sum() > 0, f"{name} was not trained"
    options = parse_options(glue_options(folder, task, "scored"))
    base = classification.load_model(str(folder / "model"), options, torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    _, records = classification.choose_records(options)
    rows = [tokenizer(first, second, return_tensors="pt", return_token_type_ids=False) for first, second, _ in records]
    with torch.no_grad():
        logits = np.concatenate([model(**row).logits.numpy() for row in rows])
    scores = classification.metrics_of(options)(EvalPrediction(logits, np.array([label for *_, label in records])))
    for name, score in scores.items():
        assert last[name] is None if np.isnan(score) else last[name] == pytest.approx(score, abs=1e-4)


def test_labels_are_learnt_and_resumed(folder: Path) -> None:
    """More steps, so that the task is solved; a run that resumes ends with the same head and factors."""
    changes = {"max_steps": 60, "eval_steps": 30, "save_strategy": "steps", "save_steps": 30, "logging_steps": 10}
    metrics = _run(folder, "mnli", "ddp", "learnt", **changes, lr_scheduler_type="constant")
    assert metrics["held_out_metrics"][-1]["accuracy"] > 0.9
    _run(
        *(folder, "mnli", "ddp", "learnt-resumed"),
        **{**changes, "lr_scheduler_type": "constant", "resume_from_checkpoint": folder / "learnt" / "checkpoint-30"},
    )
    whole, resumed = (load_file(folder / n / "adapter_model.safetensors") for n in ("learnt", "learnt-resumed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"bf16": True}, {"target_modules": None}, {"init_lora_weights": "kaiming_both"}])
@pytest.mark.parametrize("engine", ["zero3", pytest.param("ddp", marks=pytest.mark.all_ranks)])
def test_options(folder: Path, engine: str, changes: dict[str, Any]) -> None:
    """Regression in bf16; PEFT's all-linear leaves the new layers alone; a start that changes the base."""
    output = f"{engine}-{next(iter(changes))}"
    metrics = _run(folder, "stsb", engine, output, **changes)
    assert metrics["report"]["applied_steps"] == 4
    names = load_file(folder / output / "adapter_model.safetensors")
    assert not any("lora_" in name for name in names if "pooler" in name or "classifier" in name)


def test_metrics_by_hand() -> None:
    """Against figures worked out on paper: 2 true and 1 false positive, 1 false and 2 true negatives."""

    def scored(task: str, logits: Any, labels: Any) -> dict[str, float]:
        options = type("Options", (), {"classification": ClassificationOptions(task="seq-cls", glue_task=task)})
        return classification.metrics_of(options)(EvalPrediction(np.array(logits), np.array(labels)))  # type: ignore[arg-type]

    labels, predicted = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
    logits = [[0.0, 1.0] if p else [1.0, 0.0] for p in predicted]
    assert scored("sst2", logits, labels) == pytest.approx({"accuracy": 4 / 6})
    assert scored("mrpc", logits, labels) == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3})
    assert scored("cola", logits, labels) == pytest.approx({"matthews_correlation": 1 / 3})
    # ranks 1 2 3 against 1 3 2; deviations (-1, 0, 1) and (-2, 3, -1)
    assert scored("stsb", [[1.0], [6.0], [2.0]], [1.0, 2.0, 3.0]) == pytest.approx(
        {"pearson": 1 / (2 * 14) ** 0.5, "spearman": 0.5}
    )
    assert set(scored("mnli", [[0.0, 1.0, 2.0]], [2])) == {"accuracy"}


def test_undefined_correlations_are_none() -> None:
    options = type("Options", (), {"classification": ClassificationOptions(task="seq-cls", glue_task="stsb")})
    history = [{"loss": 1.0, "step": 1}, {"eval_pearson": float("nan"), "eval_spearman": 0.5, "step": 2}]
    points = classification.held_out_metrics(history, options)  # type: ignore[arg-type]
    assert points == [{"step": 2, "set": "validation", "pearson": None, "spearman": 0.5}]
    assert classification.describe(points[0]) == "validation, step 2: pearson none, spearman 0.5000\n"


@pytest.mark.parametrize("task", sorted(GLUE))
def test_glue_of_the_hub_has_these_fields(task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows as the hub has them give the records that local files give, from the splits of that task."""
    asked: list[tuple[Any, ...]] = []
    path = write_glue(tmp_path / "rows.jsonl", task, count=9)
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def load_hub(*arguments: Any) -> Any:
        asked.append(arguments)
        return rows

    monkeypatch.setattr(classification, "load_hub", load_hub)
    common = ["--task=seq-cls", f"--glue_task={task}", "--model=any", f"--output_dir={tmp_path}"]
    from_hub = parse_options(common)
    local = parse_options([*common, f"--dataset={path}", f"--eval_dataset={path}"])
    assert classification.choose_records(from_hub) == classification.choose_records(local)
    further = classification.further_records(from_hub)
    assert list(further) == (["mismatched"] if task == "mnli" else [])
    splits = ["train", "validation_matched", "validation_mismatched"] if task == "mnli" else ["train", "validation"]
    assert asked == [("nyu-mll/glue", split, task) for split in splits]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sentence1": "a", "label": 1}, "a record of mrpc needs the texts sentence1, sentence2"),
        ({"sentence1": "a", "sentence2": "b", "label": 2}, "label 2 is none of 0 to 1"),
        ({"sentence1": "a", "sentence2": "b", "label": -1}, "test sets of GLUE have no labels"),
        ({"sentence1": "a", "sentence2": "b", "label": "yes"}, "label 'yes' is none of"),
        ({"sentence1": "a", "sentence2": "b"}, "label None is none of"),
        ({"sentence1": "a", "sentence2": "b", "label": True}, "label True is none of"),
        (
            {"sentence1": "a", "sentence2": ["b"], "label": 1},
            "field 'sentence2' is a list, not a text; a record of mrpc",
        ),
        ({"sentence1": "a \ud800", "sentence2": "b", "label": 1}, "field 'sentence1' holds .*half of a surrogate pair"),
        ("text", "a str, not a record; a record of mrpc needs"),
    ],
)
def test_unusable_records_are_named(folder: Path, tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        classification.choose_records(parse_options(glue_options(folder, "mrpc", "bad", dataset=path)))
    assert f"{path}, line 1" in str(caught.value)
    path.write_text(json.dumps({"sentence1": "a", "sentence2": "b", "label": 5.5}))
    with pytest.raises(ValueError, match=r"label 5.5 is no number from 0 to 5"):
        classification.choose_records(parse_options(glue_options(folder, "stsb", "bad", dataset=path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_glue_task": True}, "task=seq-cls needs --glue_task"),
        ({"task": None}, "glue_task='mrpc' means nothing without --task seq-cls"),
        ({"cls_dropout": 1.0}, r"cls_dropout=1.0 must be in \[0, 1\)"),
        ({"mismatched_dataset": "x.jsonl"}, "is for mnli"),
        ({"model": None}, "task=seq-cls needs --model"),
        ({"method": "lora-xs", "reflora_warmup_steps": None}, "method='lora-xs' is for --task causal-lm"),
        ({"packing": True}, "packing=True means nothing to --task seq-cls"),
        ({"prompt_template": "alpaca"}, "prompt_template='alpaca' means nothing"),
    ],
)
def test_mistakes_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    argv = glue_options(folder, "mrpc", "mistake", **changes)
    if "no_glue_task" in changes:
        argv = [part for part in argv[:-2] if part not in ("--glue_task", "mrpc")]
    with pytest.raises(ValueError, match=message):
        classification.choose_records(parse_options(argv))


_USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PADDED = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "Llama": {**_USUAL, "intermediate_size": 48},
    "OPT": {**_USUAL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bert": {**_USUAL, "intermediate_size": 48},
    "Roberta": {**_USUAL, "intermediate_size": 48, "pad_token_id": 1},  # which is in its table of positions
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_head": 8, "d_inner": 48},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_no_logits(folder: Path, name: str, side: str) -> None:
    """Whichever side the tokenizer's files name, and though language models' configurations name no padding token."""
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": 50, "pad_token_id": None, **PADDED[name]})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side=side)
    if name == "Roberta":
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    collate = classification.collator(tokenizer, model, 8)
    rows = [{"input_ids": list(range(7, 7 + length)), "labels": 0} for length in (3, 9)]
    with torch.no_grad():
        together = model(**collate(rows)).logits
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


def test_a_length_for_special_tokens_alone_is_refused(folder: Path) -> None:
    with pytest.raises(SystemExit, match="max_length=3 leaves no token of a text beside 3 special ones: raise it"):
        finetune.main(glue_options(folder, "mrpc", "short", max_length=3))


def test_the_dropout_of_the_classifier(folder: Path) -> None:
    options = parse_options(glue_options(folder, "mrpc", "dropout", cls_dropout=0.25))
    model = classification.load_model(str(folder / "model"), options, torch.float32)
    assert (model.dropout.p, model.new_heads) == (0.25, ["pooler.dense"])
    assert isinstance(model, type(AutoModelForSequenceClassification.from_config(model.config)))
    with pytest.raises(ValueError, match=r"cls_dropout=0.25: models of type 'llama' have none"):
        classification._set_dropout(type("Config", (), {"model_type": "llama"}), 0.25)
