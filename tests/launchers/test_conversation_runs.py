"""A run on records of all forms: tokenizer and template go along to checkpoints, questions, evaluation and merging."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from launchers import ask, export
from launchers.evaluate import EvaluateOptions
from tests.support.chat_templates import chat_tokenizer
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import micro_model

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A row of items."},
    {"role": "user", "content": "And a set?"},
    {"role": "assistant", "content": "A bag."},
]
RECORDS = [
    {"messages": TURNS},
    {"prompt": TURNS[:4], "completion": TURNS[4:]},
    {"prompt": "The sum of 1 and 2 is", "completion": " 3."},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with packed rows, the first of them saved."""
    folder = tmp_path_factory.mktemp("conversations")
    base = micro_model(folder / "model")
    tokenizer = chat_tokenizer(base, "headers", "sentencepiece")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(base)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS * 8)
    (folder / "records.jsonl").write_text(lines, encoding="utf-8")
    changes: dict[str, Any] = {"packing": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    changes |= {"max_length": 200, "use_cache": False, "save_total_limit": 3}
    options = finetune_options(folder, "run", **changes)
    run_ranks(finetune_rank, 1, "single", options, init_process_group=False, timeout=240)
    return folder


def test_the_template_is_recorded(folder: Path) -> None:
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["settings"]["prompt_template"] == "chat" and metrics["steps"] == 3
    adapter = str(folder / "run")
    assert EvaluateOptions(adapter=adapter).prompt_template == "chat"
    assert EvaluateOptions(adapter=adapter, prompt_template="plain").prompt_template == "plain"


@pytest.mark.parametrize("saved", ["run", "run/checkpoint-1", "merged", "merged-checkpoint"])
def test_the_tokenizer_goes_along(saved: str, folder: Path) -> None:
    if saved.startswith("merged"):
        adapter = "run" if saved == "merged" else "run/checkpoint-1"
        export.main([f"--adapter={folder / adapter}", f"--output_dir={folder / saved}", "--merge"])
    base, found = (AutoTokenizer.from_pretrained(folder / name) for name in ("model", saved))
    assert found.chat_template == base.chat_template and found.chat_template
    for text in (base.apply_chat_template(TURNS, tokenize=False), "  f(x) = 12\n\té"):
        assert found(text)["input_ids"] == base(text)["input_ids"]


@pytest.mark.parametrize("adapter", ["run", "run/checkpoint-1"])
def test_questions_are_put_through_the_template(
    adapter: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts: list[str] = []

    def generate(model: Any, tokenizer: Any, asked: list[list[int]], max_new_tokens: int) -> list[str]:
        assert set(model.generation_config.eos_token_id) >= {tokenizer.convert_tokens_to_ids("<|eot_id|>")}
        prompts.extend(map(tokenizer.decode, asked))
        return ["yes"]

    monkeypatch.setattr(ask, "generate", generate)
    for argv in (["--question", "And a set?"], ["--records", str(folder / "records.jsonl"), "--count", "4"]):
        monkeypatch.setattr(sys, "argv", ["ask.py", "--adapter", str(folder / adapter), *argv])
        ask.main()
    shown = [
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for turns in (TURNS[3:4], TURNS[:4], [{"role": "user", "content": "Add.\n\n1 2"}])
    ]
    expected = [shown[0], shown[1], shown[1], "<s>The sum of 1 and 2 is", shown[2]]
    assert [prompt.replace(" ", "") for prompt in prompts] == [prompt.replace(" ", "") for prompt in expected]
    assert re.search(r"Q: And a set\?\nA: yes\n   reference +A bag\.\n", capsys.readouterr().out)
