"""A small DeBERTa and records with GLUE's fields."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
)

from launchers.training.glue_tasks import GLUE

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "good", "bad", "same", "other")
LAYERS = 2


def micro_deberta(folder: Path) -> Path:
    """A DeBERTaV3 of 20 thousand parameters without a head, as it is published, with a tokenizer beside it."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    backend.train_from_iterator(
        [" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=backend.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        type_vocab_size=0,
        # as microsoft/deberta-v3-base
        relative_attention=True,
        max_relative_positions=-1,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        pooler_hidden_size=32,
        pad_token_id=0,
    )
    DebertaV2Model(config).save_pretrained(folder)
    return folder


def write_glue(path: Path, task: str, count: int = 48, seed: int = 0) -> Path:
    """Records of a task whose label can be learnt: it is decided by one word of the first text."""
    glue, draw = GLUE[task], random.Random(seed)
    lines = []
    for index in range(count):
        label = index % (glue.num_labels or 6)
        record: dict[str, Any] = {
            field: " ".join([*draw.choices(WORDS[6:], k=draw.randint(2, 6)), *([WORDS[label]] if first else [])])
            for first, field in zip((True, False), glue.fields, strict=False)
        }
        lines.append(json.dumps({**record, "label": label if glue.num_labels else label * 0.9, "idx": index}))
    path.write_text("\n".join(lines) + "\n")
    return path


TARGETS = ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"]


def glue_options(folder: Path, glue_task: str, output: str, **changes: Any) -> list[str]:
    options = {
        "task": "seq-cls",
        "glue_task": glue_task,
        "model": folder / "model",
        "dataset": folder / f"{glue_task}.jsonl",
        "eval_dataset": folder / f"{glue_task}-validation.jsonl",
        "output_dir": folder / output,
        "cache_dir": folder / "cache",
        "target_modules": " ".join(TARGETS),
        "lora_r": 4,
        "lora_alpha": 4,
        "reflora_warmup_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "eval_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    values = {name: value for name, value in options.items() if value is not None}
    return [part for name, value in values.items() for part in (f"--{name}", *str(value).split(" "))]
