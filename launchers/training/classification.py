"""``finetune.py --task seq-cls``: sequence classification on GLUE, with each task's own metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from reflora_dist.checkpoints.embeddings import input_embedding
from reflora_dist.files.base_files import load_base, read_model_config, require_no_missing

from ..cluster.waiting import working_first
from ..data.forms import require_record, text_field
from ..data.records import is_local_file, load_hub, parse_file, split_records
from ..data.tokenization import cached_dataset
from .glue_tasks import ClassificationOptions

if TYPE_CHECKING:
    from .options import Options

FORMAT_VERSION = 1  # part of the cache key; raise it when the encoding changes
HUB = "nyu-mll/glue"
# The attribute by which a model's configuration names the dropout in front of its classifier.
DROPOUT_NAMES = {"deberta": "cls_dropout", "deberta-v2": "cls_dropout", "bert": "classifier_dropout"}
DROPOUT_NAMES |= {"roberta": "classifier_dropout"}
# Heads that PEFT trains in full by itself.
PEFT_HEADS = ("classifier", "score")


def check_options(options: Options) -> None:
    """Refuse options that classification does not support.

    Raises:
        ValueError: no model is named, or an option is for language models only.
    """
    if options.model.model is None:
        raise ValueError("task=seq-cls needs --model, for example microsoft/deberta-v3-base")
    if options.lora.latent:
        raise ValueError(f"method={options.lora.method!r} is for --task causal-lm: its adapter has no classifier")
    if options.model.load_in_4bit:
        raise ValueError("load_in_4bit is for --task causal-lm: drop it, classification models are small")
    for name in ("prediction_loss_only", "batch_eval_metrics"):
        if getattr(options.training, name):
            raise ValueError(f"{name}=True: the metrics of --task seq-cls are of all predictions together; drop it")
    for name, default in (("packing", False), ("train_on_prompt", False), ("prompt_template", None)):
        if getattr(options.data, name) != default:
            raise ValueError(f"{name}={getattr(options.data, name)!r} means nothing to --task seq-cls: drop it")


def choose_records(options: Options) -> tuple[list[Any], list[Any]]:
    """Return the training and validation records.

    Raises:
        ValueError: a file or data set cannot be read, or a record is unusable.
    """
    data, arguments, task = options.data, options.training, options.classification
    check_options(options)
    with working_first(arguments.local_process_index == 0, "loading the records"):
        train = _load(task, data.dataset, data.dataset_split, "train")
        if data.eval_fraction:
            return _limited(split_records(train, data.eval_fraction, arguments.seed), data.max_eval_records)
        if data.dataset and not data.eval_dataset:
            return train, []
        return _limited(
            (train, _load(task, data.eval_dataset, data.eval_dataset_split, task.glue.validation)),
            data.max_eval_records,
        )


def further_records(options: Options) -> dict[str, list[Any]]:
    """Return the sets to evaluate after training, by name: MNLI's mismatched validation set."""
    task = options.classification
    if task.glue_task != "mnli" or (options.data.dataset and not task.mismatched_dataset):
        return {}
    with working_first(options.training.local_process_index == 0, "loading the records"):
        records = _load(task, task.mismatched_dataset, options.data.eval_dataset_split, "validation_mismatched")
    return {"mismatched": records[: options.data.max_eval_records]}


def _limited(records: tuple[list[Any], list[Any]], count: int | None) -> tuple[list[Any], list[Any]]:
    return records[0], records[1][:count]


def _load(task: ClassificationOptions, sources: list[str], split: str, hub_split: str) -> list[Any]:
    """Return records ``[text, second text or None, label]`` of all sources, or of the hub's GLUE without sources."""
    if not sources:
        rows = enumerate(load_hub(HUB, hub_split, task.glue_task), start=1)
        return [_checked(task, row, f"{HUB}, {task.glue_task}, {hub_split}, record {number}") for number, row in rows]
    records: list[Any] = []
    for source in sources:
        local = is_local_file(source)
        numbered = parse_file(Path(source)) if local else enumerate(load_hub(source, split), start=1)
        word = "line" if local else "record"
        loaded = [_checked(task, row, f"{source}, {word} {number}") for number, row in numbered]
        if not loaded:
            raise ValueError(f"{source}: holds no record")
        records += loaded
    return records


def _checked(task: ClassificationOptions, row: Any, place: str) -> list[Any]:
    glue = task.glue
    expected = f'a record of {task.glue_task} needs the texts {", ".join(glue.fields)} and a "label"'
    require_record(row, place, expected)
    texts = [text_field(row, field, place, expected) for field in glue.fields]
    label = row.get("label")
    if glue.num_labels is None:
        if not isinstance(label, int | float) or isinstance(label, bool) or not 0 <= label <= 5:
            raise ValueError(f"{place}: label {label!r} is no number from 0 to 5; {expected}")
        label = float(label)
    elif not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < glue.num_labels:
        hint = "; test sets of GLUE have no labels" if label == -1 else ""
        raise ValueError(f"{place}: label {label!r} is none of 0 to {glue.num_labels - 1}{hint}; {expected}")
    return [texts[0], texts[1] if len(texts) > 1 else None, label]


def encoded(options: Options, tokenizer: Any, records: list[Any], *, build: bool, packing: bool = False) -> Any:
    """Return the records as token ids, cut at ``max_length``, and ``labels``; see ``cached_dataset``."""
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no padding token; --task seq-cls needs one")
    max_length = options.data.max_length
    special = tokenizer.num_special_tokens_to_add(pair=records[0][1] is not None)
    if max_length <= special:
        raise ValueError(f"max_length={max_length} leaves no token of a text beside {special} special ones: raise it")

    def encode(told: Any) -> list[dict[str, Any]]:
        texts, pairs, labels = (list(column) for column in zip(*records, strict=True))
        columns = tokenizer(texts, None if pairs[0] is None else pairs, truncation=True, max_length=max_length)
        rows = [dict(zip(columns.keys(), row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [{**row, "labels": label} for row, label in zip(rows, labels, strict=True)]

    key = {"format": FORMAT_VERSION, "classification": options.classification.glue_task, "max_length": max_length}
    return cached_dataset(tokenizer, records, key, encode, Path(options.data.cache_dir), build=build)


def collator(tokenizer: Any, model: Any, multiple_of: int) -> DataCollatorWithPadding:
    """Return a collator that pads to the longest row of a batch, on the side that the model's head expects.

    A decoder's head reads the last token that is not the configuration's padding token. Language models often have
    none, so it is set here. Other heads read the first place, and XLNet's head reads the last place.
    """
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left" if model.config.model_type == "xlnet" else "right"
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of)


def load_model(name: str, options: Options, dtype: Any) -> Any:
    """Return the model with a head for the task. Its ``new_heads`` names the layers that the checkpoint lacks.

    Raises:
        ValueError: the model cannot be found or read, or its dropout cannot be set.
    """
    classification = options.classification
    config = read_model_config(name, num_labels=classification.glue.num_labels or 1)
    if classification.cls_dropout is not None:
        _set_dropout(config, classification.cls_dropout)
    model, missing = load_base(
        AutoModelForSequenceClassification,
        name,
        config,
        dtype=dtype,
        attn_implementation=options.model.attn_implementation,
    )
    # the checkpoint may lack a head, but no numbered layer and no token embedding
    layer = re.compile(rf"{model.base_model_prefix}\..*\.\d+\.")
    words = input_embedding(model)
    embedding = {f"{n}.weight" for n, m in model.named_modules() if m is words}
    require_no_missing(name, [key for key in missing if layer.match(key) or key in embedding])
    layers = sorted({key.rpartition(".")[0] for key in missing})
    model.new_heads = [layer for layer in layers if not set(PEFT_HEADS) & set(layer.split("."))]
    return model


def _set_dropout(config: Any, probability: float) -> None:
    name = DROPOUT_NAMES.get(config.model_type)
    if name is None:
        raise ValueError(f"cls_dropout={probability}: models of type {config.model_type!r} have none that can be set")
    setattr(config, name, probability)


def metrics_of(options: Options) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return Trainer's ``compute_metrics``: logits ``[records, labels]`` and labels ``[records]`` to metrics."""
    from scipy import stats
    from sklearn import metrics

    functions: dict[str, Callable[[Any, Any], Any]] = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews_correlation": metrics.matthews_corrcoef,
        "pearson": lambda labels, predicted: stats.pearsonr(labels, predicted).statistic,
        "spearman": lambda labels, predicted: stats.spearmanr(labels, predicted).statistic,
    }
    glue = options.classification.glue

    def compute(outcome: EvalPrediction) -> dict[str, float]:
        logits = outcome.predictions[0] if isinstance(outcome.predictions, tuple) else outcome.predictions
        predicted = logits.reshape(-1) if glue.num_labels is None else logits.argmax(axis=-1)
        return {name: float(functions[name](outcome.label_ids, predicted)) for name in glue.metrics}

    return compute


def held_out_metrics(history: list[dict[str, Any]], options: Options) -> list[dict[str, Any]]:
    """Return the metrics of every evaluation in Trainer's log, with the step and the name of the set.

    A correlation is None if all predictions are equal, because it does not exist then.
    """
    points = []
    names = options.classification.glue.metrics
    for entry in history:
        for prefix, data in (("eval", "validation"), ("mismatched", "mismatched")):
            scores = {name: float(entry[f"{prefix}_{name}"]) for name in names if f"{prefix}_{name}" in entry}
            if scores:
                finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
                points.append({"step": entry["step"], "set": data, **finite})
    return points


def describe(point: dict[str, Any]) -> str:
    """Format one entry of :func:`held_out_metrics` as a line."""
    scores = {name: score for name, score in point.items() if name not in ("step", "set")}
    shown = ", ".join(f"{name} {'none' if score is None else f'{score:.4f}'}" for name, score in scores.items())
    return f"{point['set']}, step {point['step']}: {shown}\n"
