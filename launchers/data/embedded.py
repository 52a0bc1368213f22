"""The embedded default: a tokenizer, a small LLaMA and instruction records, all made on this machine.

To fill the cache run ``python launchers/data/embedded.py --cache-dir DIR``. Everything is written to a temporary folder
and then renamed, so a cache folder is either complete or absent.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    runpy.run_module("launchers.data.embedded", run_name="__main__", alter_sys=True)
    raise SystemExit

from . import stdlib_text
from .cache import build_once, default_cache_dir

FORMAT_VERSION = 1  # part of every cache key; raise it when the meaning of what is stored changes
# With a launcher's variables the pre-training would join the fine-tuning job's process group, and hang in it.
_DISTRIBUTED_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"}
    | {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}
)
_DISTRIBUTED_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PMI_", "OMPI_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedSettings:
    """Sizes of the embedded model and of its pre-training (about two minutes on two CPU cores)."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 672
    num_layers: int = 4
    num_heads: int = 4
    max_positions: int = 512
    pretrain_steps: int = 680
    batch_size: int = 8
    seq_length: int = 128
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pretrain_steps < 1:
            raise ValueError(f"pretrain_steps={self.pretrain_steps} must be at least 1")


def ensure_records(cache_dir: Path, *, build: bool = True) -> tuple[Path, Path]:
    """Return the paths of the training and the held-out instruction records (JSONL). Make them if needed.

    Args:
        cache_dir: where the embedded files are kept.
        build: False on ranks that only use what another rank built.

    Raises:
        RuntimeError: nothing is cached and ``build`` is False, or the interpreter has no library sources.
    """
    folder = build_once(cache_dir, "records", _key({}), _build_records, build=build)
    return folder / "train.jsonl", folder / "held_out.jsonl"


def ensure_model(cache_dir: Path, settings: EmbeddedSettings, *, build: bool = True) -> Path:
    """Return the folder of the pre-trained model with its tokenizer. A process of its own makes it if needed.

    Arguments and errors are those of :func:`ensure_records`.
    """

    def build_in_subprocess(folder: Path) -> None:
        environment = _environment_of_one_process()
        command = [sys.executable, str(Path(__file__).resolve()), "--build-model", str(folder)]
        command += ["--settings", json.dumps(dataclasses.asdict(settings))]
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            raise RuntimeError(f"pre-training the embedded model failed; run it alone to see why: {command}")

    return build_once(cache_dir, "model", _key(dataclasses.asdict(settings)), build_in_subprocess, build=build)


def _key(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the cache key. The text comes from the interpreter, so its exact build is part of the key."""
    return {"format": FORMAT_VERSION, "python": sys.version, "machine": platform.machine(), **settings}


def _environment_of_one_process() -> dict[str, str]:
    """Return this process's environment without the launcher's part, for one device and all allowed cores."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _DISTRIBUTED_VARIABLES and not name.startswith(_DISTRIBUTED_PREFIXES)
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment["OMP_NUM_THREADS"] = str(min(cores, 8))  # more threads do not help so small a model
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow where cores are shared
    environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return environment


def _build_records(folder: Path) -> None:
    text = stdlib_text.collect()
    for name, records in (("train", text.train_records), ("held_out", text.held_out_records)):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_tokenizer(folder: Path, documents: list[str], vocab_size: int) -> None:
    """Train a byte-fallback BPE SentencePiece model and write it as a LLaMA tokenizer folder."""
    import sentencepiece

    lines = [line for document in documents for line in document.split("\n") if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        # Python's indentation must survive: no normalization, and runs of spaces are pieces of their own.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(folder: Path, settings: EmbeddedSettings) -> None:
    """Train the tokenizer, pre-train a LLaMA on the standard library's text and write both to ``folder``."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

    text = stdlib_text.collect()
    build_tokenizer(folder, text.documents, settings.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            max_position_embeddings=settings.max_positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    blocks = _token_blocks(tokenizer, text.documents, settings.seq_length)
    print(
        f"Pre-training a LLaMA of {model.num_parameters() / 1e6:.1f} M parameters on the standard library's "
        f"text ({len(blocks) * settings.seq_length:,} tokens), {settings.pretrain_steps} steps",
        flush=True,
    )
    _pretrain(model, blocks, settings)
    model.save_pretrained(folder)


def _token_blocks(tokenizer: Any, documents: list[str], seq_length: int) -> list[dict[str, list[int]]]:
    """Join the documents, each between start and end token, and cut them into blocks of ``seq_length`` tokens."""
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for ids in encoded for token in [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]]
    starts = range(0, len(stream) - seq_length + 1, seq_length)
    return [{"input_ids": stream[i : i + seq_length], "labels": stream[i : i + seq_length]} for i in starts]


def _pretrain(model: Any, blocks: list[dict[str, list[int]]], settings: EmbeddedSettings) -> None:
    import torch
    from transformers import Trainer, TrainingArguments, default_data_collator

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.pretrain_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.pretrain_steps // 20),
            weight_decay=0.1,
            logging_steps=max(1, settings.pretrain_steps // 10),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=settings.seed,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=blocks,  # type: ignore[arg-type]  # a list is a map-style dataset
            data_collator=default_data_collator,
        )
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded records and model, or find them in the cache.")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--pretrain-steps", type=int, default=EmbeddedSettings.pretrain_steps)
    parser.add_argument("--build-model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build_model:
        build_model(options.build_model, EmbeddedSettings(**options.settings))
        return
    start = time.perf_counter()
    settings = EmbeddedSettings(pretrain_steps=options.pretrain_steps)
    train_path, held_out_path = ensure_records(options.cache_dir)
    model_path = ensure_model(options.cache_dir, settings)
    print(f"records   {train_path}\nheld out  {held_out_path}\nmodel     {model_path}")
    print(f"ready after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
