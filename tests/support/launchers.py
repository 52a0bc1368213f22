"""What the launchers' tests share: micro models, tokenizers of both kinds, records, launching with a limit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launchers.data.embedded import build_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
# real questions, beside the whole of the reference trajectories
DATA = Path(os.environ.get("REFLORA_REFERENCE") or REPOSITORY.parent / "shared" / "reference").parent / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")
TEXTS = [
    "Return the number of items in a container, or raise an error if it has none.",
    "def add(a, b):\n    return a + b",
    "What does the function read_all do? It reads the whole file and returns its text.",
    "Split a line at each comma; empty parts are kept, spaces are not removed.",
] * 8


def sentencepiece_tokenizer(folder: Path) -> Any:
    """A LLaMA tokenizer that is stored as a SentencePiece model only."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder, TEXTS, vocab_size=360)
    assert not (folder / "tokenizer.json").exists()
    return AutoTokenizer.from_pretrained(folder)


def fast_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer as the ``tokenizers`` library stores it, without a start token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


TOKENIZERS = {"sentencepiece": sentencepiece_tokenizer, "fast": fast_tokenizer}


def micro_model(folder: Path, kind: str = "sentencepiece") -> Path:
    """A LLaMA of 40 thousand parameters with a tokenizer beside it."""
    tokenizer = TOKENIZERS[kind](folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_records(path: Path, count: int = 40) -> Path:
    """Records whose answers can be learnt from their questions."""
    records = [
        {
            "instruction": f"What does the function item_{i} do?",
            "input": f"item_{i}(x)" if i % 2 else "",
            "output": f"Return the number {i} of the container.",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def short_training(folder: Path, output: str) -> list[str]:
    """Three steps of finetune.py on the model and the records of a folder."""
    options = {
        "model": folder / "model",
        "dataset": folder / "records.jsonl",
        "eval_fraction": 0.2,
        "output_dir": folder / output,
        "cache_dir": folder / "cache",
        "reflora_warmup_steps": 1,
        "max_length": 96,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
    }
    return [f"--{name}={value}" for name, value in options.items()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command: list[str | Path], *, timeout_s: float, expect_failure: bool = False, **environment: str) -> str:
    """Run a command in the repository and return what it printed; the output is shown if it goes wrong."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **environment,
    }
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=REPOSITORY,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout
        raise AssertionError(f"not done after {timeout_s} s: {command}\n{output}") from error
    assert (done.returncode != 0) == expect_failure, f"{command} returned {done.returncode}\n{done.stdout}"
    return done.stdout


NUM_QUESTIONS = 7  # of each task: shares and last batches are uneven


def write_questions(data: Path) -> None:
    for task, answers in (("boolq", ("true", "false")), ("winogrande", ("option1", "option2")), ("gsm8k", ("3", "-7"))):
        records = [
            {"instruction": f"{task} {i * 7919}? " + TEXTS[i % 4] * (i % 3), "input": "", "answer": answers[i % 2]}
            for i in range(NUM_QUESTIONS)
        ]
        (data / task).mkdir(parents=True)
        (data / task / "test.json").write_text(json.dumps(records))
