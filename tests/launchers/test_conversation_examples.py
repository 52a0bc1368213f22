"""Examples of conversations and of prompts with completions: labels, lengths and packed rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from launchers.data.records import Record
from launchers.data.tokenization import (
    IGNORE_INDEX,
    Collator,
    TokenizationSettings,
    encode_last_question,
    encode_prompts,
    tokenize,
)
from tests.support.chat_templates import ENDS, TEMPLATES, chat_tokenizer
from tests.support.launchers import TOKENIZERS, fast_tokenizer, micro_model

DEFAULT = TokenizationSettings()
USER, ANSWER = {"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of items."}
INSTRUCTION = Record(instruction="Add.", input="1 2", output="3")
TEXT = Record(prompt="The sum of 1 and 2 is", completion=" 3.")
CONVERSATION = Record(
    messages=[USER, ANSWER, {"role": "user", "content": "And a set?"}, {**ANSWER, "content": "A bag."}]
)
PARTS = Record(prompt=CONVERSATION["messages"][:3], completion=CONVERSATION["messages"][3:])


def _learnt(example: dict[str, list[int]]) -> list[int]:
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(*map(example.get, ("labels", "input_ids"))))  # noqa: B905
    return [label for label in example["labels"] if label != IGNORE_INDEX]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {(t, kind): chat_tokenizer(folder / t / kind, t, kind) for t in TEMPLATES for kind in TOKENIZERS}


# no special tokens, and nothing that a tokenizer normalizes away
_TEXTS = st.text(st.sampled_from("abc xyz,.:;'\n\t()[]{}019é漢\U0001f600"), min_size=1, max_size=30).filter(str.strip)


def _written(template: str, content: str, end: str) -> str:
    if template == "inst":
        return f" {content} {end}"
    return (content.strip() if template in ("headers", "strict") else content) + end


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_learnt_tokens_are_the_answers_with_their_ends(tokenizers: dict[tuple[str, str], Any], data: Any) -> None:
    template, kind = data.draw(st.sampled_from(sorted(tokenizers)))
    tokenizer = tokenizers[template, kind]
    system = template not in ("strict", "inst") and data.draw(st.booleans())
    turns = [{"role": "system", "content": data.draw(_TEXTS)}] if system else []
    for _ in range(data.draw(st.integers(1, 3))):
        turns += [{"role": role, "content": data.draw(_TEXTS)} for role in ("user", "assistant")]
    (example,) = tokenize(tokenizer, [Record(messages=turns)], TokenizationSettings(max_length=10_000))
    end = ENDS[template] or tokenizer.eos_token
    expected = "".join(_written(template, t["content"], end) for t in turns if t["role"] == "assistant")
    found = tokenizer.decode(_learnt(example))
    if kind == "sentencepiece":  # its decoding leaves out spaces beside special tokens
        found, expected = found.replace(" ", ""), expected.replace(" ", "")
    assert found == expected


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_prompt_and_its_completion_are_taken_as_they_are(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind](tmp_path)
    for completion in (" 3.", "3.", "\n3."):
        record = Record(prompt=TEXT["prompt"], completion=completion)
        (example,) = tokenize(tokenizer, [record], DEFAULT)
        prompt = encode_last_question(tokenizer, record, "none")
        assert example["input_ids"][: len(prompt)] == prompt == encode_prompts(tokenizer, [record["prompt"]])[0]
        assert example["input_ids"] == [*prompt, *_learnt(example)]
        assert example["input_ids"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == record["prompt"] + completion


def test_a_completion_that_begins_inside_a_token_begins_where_generation_does(tmp_path: Path) -> None:
    tokenizer = fast_tokenizer(tmp_path)
    tokenizer.add_tokens(["is3"])
    (example,) = tokenize(tokenizer, [Record(prompt="It is", completion="3.")], DEFAULT)
    assert tokenizer.decode(_learnt(example)[:-1]) == "3."
    assert tokenizer.decode(example["input_ids"][:-1]) == "It is3."


def test_forms_are_mixed_in_one_data_set(tmp_path: Path) -> None:
    """The conversation decides for the chat template; texts stay as they are."""
    tokenizer = chat_tokenizer(tmp_path, "chatml")
    examples = tokenize(tokenizer, [INSTRUCTION, TEXT, CONVERSATION, PARTS], DEFAULT)
    learnt = [tokenizer.decode(_learnt(example)) for example in examples]
    assert learnt == ["3<|im_end|>", " 3.<end>", "A row of items.<|im_end|>A bag.<|im_end|>", "A bag.<|im_end|>"]
    assert examples[2]["input_ids"] == examples[3]["input_ids"]
    whole = TokenizationSettings(train_on_prompt=True)
    for example in tokenize(tokenizer, [INSTRUCTION, TEXT, CONVERSATION, PARTS], whole):
        assert example["labels"] == [IGNORE_INDEX, *example["input_ids"][1:]]


def test_the_last_question_is_encoded_as_in_training(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "chatml")
    for record in (INSTRUCTION, TEXT, CONVERSATION, PARTS):
        (example,) = tokenize(
            tokenizer, [record], TokenizationSettings(prompt_template=None if record is TEXT else "chat")
        )
        prompt = encode_last_question(tokenizer, record, "chat")
        assert example["input_ids"][: len(prompt)] == prompt
        assert example["labels"][len(prompt) - 1] == IGNORE_INDEX != example["labels"][len(prompt)]


def test_a_template_of_ours_writes_one_question_and_its_answer(tmp_path: Path) -> None:
    tokenizer = fast_tokenizer(tmp_path)  # without a chat template
    alpaca = TokenizationSettings(prompt_template="alpaca")
    asked = Record(messages=[USER, ANSWER])
    same = Record(instruction=USER["content"], input="", output=ANSWER["content"])
    assert tokenize(tokenizer, [asked], alpaca) == tokenize(tokenizer, [same], alpaca)
    longer = Record(CONVERSATION)
    longer.place = "data.jsonl, line 3"
    message = r"line 3: prompt_template='alpaca' writes one question .* user/assistant/user/assistant; give .* chat"
    with pytest.raises(ValueError, match=message):
        tokenize(tokenizer, [longer], alpaca)
    with pytest.raises(ValueError, match=r"has no chat template: give --tokenizer.*or --prompt_template plain"):
        tokenize(tokenizer, [CONVERSATION], DEFAULT)


def test_a_long_conversation_is_cut_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole answers and the beginning of one stay; a conversation of which no answer begins in time is dropped."""
    tokenizer = chat_tokenizer(tmp_path, "chatml")
    (whole,) = tokenize(tokenizer, [CONVERSATION], DEFAULT)
    first = next(i for i, label in enumerate(whole["labels"]) if label != IGNORE_INDEX)
    for length in (first + 1, len(whole["labels"]) - 4):
        (cut,) = tokenize(tokenizer, [CONVERSATION], TokenizationSettings(max_length=length))
        assert cut == {name: ids[:length] for name, ids in whole.items()}
    with caplog.at_level(logging.WARNING):
        kept = tokenize(tokenizer, [CONVERSATION, PARTS], TokenizationSettings(max_length=first + 1))
    assert len(kept) == 1 and "1 of 2 records dropped" in caplog.text
    with pytest.raises(ValueError, match=f"max_length={first} is too short.*shortest prompt has {first} tokens"):
        tokenize(tokenizer, [CONVERSATION, PARTS], TokenizationSettings(max_length=first))


def test_packed_conversations_have_the_loss_of_one_by_one(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(micro_model(tmp_path), "headers", "sentencepiece")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    records = [CONVERSATION, TEXT, INSTRUCTION, PARTS, TEXT]
    single = tokenize(tokenizer, records, TokenizationSettings(max_length=200))
    packed = tokenize(tokenizer, records, TokenizationSettings(max_length=200, packing=True))
    assert len(packed) < len(single)
    collate = Collator(pad_token_id=tokenizer.eos_token_id)

    def total_loss(rows: list[dict[str, list[int]]]) -> torch.Tensor:
        batches = [collate([row]) for row in rows]
        return sum(model(**b, use_cache=False).loss * (b["labels"][:, 1:] != IGNORE_INDEX).sum() for b in batches)

    with torch.no_grad():
        # fp32 sums of about 100 token losses in another order
        torch.testing.assert_close(total_loss(packed), total_loss(single), rtol=1e-5, atol=0)
