"""TRL encodes the same records to the same tokens, and learns the same of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from launchers.data.records import Record
from launchers.data.tokenization import IGNORE_INDEX, TokenizationSettings, tokenize
from tests.support.chat_templates import chat_tokenizer
from tests.support.launchers import micro_model

QUESTION, ANSWER = {"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of items."}
TURNS = [{"role": "system", "content": "Be short."}, QUESTION, ANSWER, {**QUESTION, "content": "And a set?"}, ANSWER]
TEXTS = [{"prompt": "The sum of 1 and 2 is", "completion": " 3."}, {"prompt": "Say it:\n", "completion": "It, twice."}]


def _as_trl(folder: Path, tokenizer: Any, records: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = SFTConfig(output_dir=str(folder / "out"), report_to="none", use_cpu=True, bf16=False, **settings)
    data = Dataset.from_list(records)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    return list(trainer.train_dataset)


@pytest.mark.parametrize("kind", ["sentencepiece", "fast"])
@pytest.mark.parametrize(
    "records",
    [TEXTS, [{"prompt": TURNS[:4], "completion": TURNS[4:]}], [{"messages": TURNS}, {"messages": TURNS[1:3]}]],
    ids=["texts", "completion", "messages"],
)
def test_trl_learns_the_same(records: list[dict[str, Any]], kind: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(micro_model(tmp_path, kind), "marked", kind)
    expected = _as_trl(tmp_path, tokenizer, records, assistant_only_loss="messages" in records[0])
    found = tokenize(tokenizer, [Record(record) for record in records], TokenizationSettings())
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs["labels"][-1] == line_break:
            theirs["labels"][-1] = IGNORE_INDEX  # TRL learns the line break behind the last end of turn, too
        assert {name: theirs[name] for name in ours} == ours
