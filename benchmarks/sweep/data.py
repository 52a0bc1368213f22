"""Model and text of the convergence benchmark, tokenized once and shared by all runs. Needs no ``datasets``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from launchers.data.embedded import EmbeddedSettings, ensure_model, ensure_records
from launchers.data.records import load_records, split_records
from launchers.data.tokenization import IGNORE_INDEX, Collator, TokenizationSettings, choose_template, tokenize
from reflora_dist.engines.bare_base import require_no_adapter
from reflora_dist.files import smollm2
from reflora_dist.files.stored_weights import find_model

EVAL_BATCH_SIZE = 16
SORTED_BATCHES = 8  # batches whose records are sorted together
SPLIT_SEED = 0  # the held-out records do not depend on a run's seed

Example = dict[str, list[int]]
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Material:
    """Training and held-out data of every run of a sweep. It is small enough to be sent to worker processes.

    Attributes:
        choosing: held-out examples that choose the learning rate.
        held_out: the other held-out examples, whose loss is reported.
    """

    model: Path
    train: list[Example]
    choosing: list[Example]
    held_out: list[Example]
    pad_token_id: int

    def batches(self, seed: int, steps: int, batch_size: int, device: torch.device) -> list[Batch]:
        """Return the training batches of one seed in order, on the device. Every epoch is shuffled anew.

        Records that follow each other are sorted by length into batches of little padding, which are shuffled again.
        """
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < steps * batch_size:
            order += torch.randperm(len(self.train), generator=generator).tolist()
        batches: list[list[int]] = []
        for first in range(0, steps, SORTED_BATCHES):
            count = min(SORTED_BATCHES, steps - first)
            group = order[first * batch_size : (first + count) * batch_size]
            group.sort(key=lambda index: len(self.train[index]["input_ids"]))
            shuffled = torch.randperm(count, generator=generator).tolist()
            batches += [group[i * batch_size : (i + 1) * batch_size] for i in shuffled]
        return [self._collate([self.train[i] for i in batch], device) for batch in batches]

    def evaluation_batches(self, examples: list[Example], device: torch.device) -> list[Batch]:
        """Return batches of all examples, sorted by length."""
        ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
        starts = range(0, len(ordered), EVAL_BATCH_SIZE)
        return [self._collate(ordered[s : s + EVAL_BATCH_SIZE], device) for s in starts]

    def _collate(self, examples: list[Example], device: torch.device) -> Batch:
        batch = Collator(pad_token_id=self.pad_token_id)(examples)
        # Padding is on the right and has no label. Under a causal mask no real token sees it, and without a mask
        # attention takes its fast path.
        del batch["attention_mask"]
        # Logits of a prompt enter no loss, and are dear in a small model with a large vocabulary.
        shifted = batch["labels"][:, 1:]
        kept = (shifted != IGNORE_INDEX).any(dim=0).nonzero().flatten()
        batch |= {"logits_to_keep": kept, "shift_labels": shifted[:, kept].contiguous()}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def describe(self) -> dict[str, Any]:
        """Return sizes, and a digest of model and text that identifies the runs of one sweep."""
        digest = hashlib.sha256(json.dumps([self.train, self.choosing, self.held_out]).encode())
        for path in sorted(self.model.glob("*.safetensors")):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        labels = sum(label != IGNORE_INDEX for example in self.held_out for label in example["labels"])
        return {
            "train_records": len(self.train),
            "choosing_records": len(self.choosing),
            "held_out_records": len(self.held_out),
            "held_out_tokens": labels,
            "digest": digest.hexdigest()[:16],
        }


def prepare(
    model: str | None,
    dataset: list[str],
    eval_dataset: list[str],
    *,
    max_length: int,
    prompt_template: str | None = None,
    max_eval_records: int,
    eval_fraction: float,
    cache_dir: Path,
) -> Material:
    """Load or make the model, read the records and tokenize them. Every other held-out record chooses the rate.

    Args:
        model: folder of a pre-trained causal language model, or smollm2; None for the embedded one.
        dataset: instruction files to train on; empty for the embedded records.
        eval_dataset: held-out instruction files; empty to hold out ``eval_fraction`` of ``dataset``.

    Raises:
        ValueError: a path does not exist, or a record cannot be used.
    """
    if model == smollm2.NAME:
        model = str(find_model(smollm2.resolve_model(model, cache_dir)))
    if model is not None and not Path(model).is_dir():
        raise ValueError(f"model={model!r} is not a folder; give one with a pre-trained model and its tokenizer")
    if model is not None:
        require_no_adapter(model, "merge it into its base first (launchers/export.py --merge)")
    if dataset:
        train, held_out = load_records(dataset), load_records(eval_dataset) if eval_dataset else []
        if not held_out:
            train, held_out = split_records(train, eval_fraction, SPLIT_SEED)
    else:
        train, held_out = (load_records([str(path)]) for path in ensure_records(cache_dir))
    folder = Path(model) if model else ensure_model(cache_dir, EmbeddedSettings())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = choose_template(prompt_template, train + held_out)
    settings = TokenizationSettings(max_length=max_length, prompt_template=template)
    held_out_examples = tokenize(tokenizer, held_out[:max_eval_records], settings)
    if len(held_out_examples) < 2:
        raise ValueError(
            f"{len(held_out_examples)} held-out records: one chooses the learning rate and another is reported"
        )
    return Material(
        model=folder,
        train=tokenize(tokenizer, train, settings),
        choosing=held_out_examples[::2],
        held_out=held_out_examples[1::2],
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
