"""Records of every form are recognized by their own fields; a record that cannot be trained on is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.data.forms import last_exchange
from launchers.data.records import Record, load_records
from launchers.data.tokenization import choose_template

USER, ANSWER = {"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of items."}
SYSTEM = {"role": "system", "content": ""}
INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3"}
TEXT = {"prompt": "1 + 2 =", "completion": " 3"}
CONVERSATION: dict[str, Any] = {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]}
PARTS: dict[str, Any] = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
FORMS: list[dict[str, Any]] = [INSTRUCTION, TEXT, CONVERSATION, PARTS]


def _written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_files_of_all_forms_are_mixed(tmp_path: Path) -> None:
    lines = _written(tmp_path / "lines.jsonl", *FORMS, SHAREGPT)
    (tmp_path / "array.json").write_text(json.dumps([CONVERSATION, INSTRUCTION]))
    asked = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    records = load_records([lines, str(tmp_path / "array.json")])
    assert records == [*FORMS, asked, CONVERSATION, INSTRUCTION]
    assert [record.place for record in records[:2]] == [f"{lines}, line 1", f"{lines}, line 2"]


def test_a_data_set_of_all_forms_has_nulls_in_the_other_fields(tmp_path: Path) -> None:
    """As Arrow stores rows of different fields, in turns too."""
    empty = dict.fromkeys(("instruction", "input", "output", "prompt", "completion", "messages"))
    turns = [{**turn, "tool_calls": None, "name": None} for turn in CONVERSATION["messages"]]
    (tmp_path / "hub").mkdir()
    rows = [{**empty, **INSTRUCTION}, {**empty, **TEXT}, {**empty, "messages": turns}]
    _written(tmp_path / "hub" / "train.jsonl", *rows)
    assert load_records([str(tmp_path / "hub")]) == [INSTRUCTION, TEXT, CONVERSATION]


def test_further_fields_of_a_record_do_not_matter(tmp_path: Path) -> None:
    """A data set may name the first question too, and have identifiers."""
    path = _written(tmp_path / "records.jsonl", {**CONVERSATION, "prompt": "What is a list?", "id": 7, "tools": []})
    assert load_records([path]) == [CONVERSATION]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**TEXT, **INSTRUCTION}, "the record has two forms, instruction/output and prompt/completion; remove the"),
        ({**TEXT, "messages": [USER, ANSWER]}, "the record has two forms, prompt/completion and messages"),
        ({"text": "a"}, r"field 'instruction' is missing \(found \['text'\]\); .*\"prompt\".*\"messages\""),
        ({"prompt": "a"}, "field 'completion' is missing"),
        ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        ({"prompt": 3, "completion": "a"}, "field 'prompt' is a int, not a text"),
        ({"prompt": "a", "completion": [ANSWER]}, "field 'completion' is a list of turns and the other is not"),
        ({"prompt": [], "completion": [ANSWER]}, "the conversation has no turn"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "the completion has no turn of the assistant"),
        ({"prompt": [USER], "completion": [{"role": "bot", "content": "a"}]}, "completion turn 1: role 'bot'"),
        ({"messages": []}, "the conversation has no turn; remove the record"),
        ({"messages": "a"}, "the conversation is a str, not a list of turns"),
        ({"messages": ["a"]}, "turn 1: a str, not a record"),
        ({"messages": [USER]}, "the conversation has no turn of the assistant, so nothing is learnt"),
        ({"messages": [ANSWER, USER, ANSWER]}, "the conversation begins with the assistant"),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2: field 'content' is missing"),
        ({"messages": [USER, {"role": "assistant", "content": "\n"}]}, "turn 2: the content is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
            "turn 2: field 'content' holds .* surrogate",
        ),
        (
            {"messages": [USER, {"role": "ai", "content": "a"}]},
            "turn 2: role 'ai' is unknown; the roles are system, user",
        ),
        ({"messages": [USER, {"content": "a"}]}, "turn 2: role None is unknown"),
        ({"messages": [USER, {"role": "tool", "content": "a"}]}, "turn 2: calls of tools are not supported"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
            "turn 2: calls of tools are not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, ANSWER]},
            r"turn 1: the content is a list of parts \(of images, say\)",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "turn 2: field 'weight' of a turn is not supported"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "field 'tools' is not supported"),
        ({**PARTS, "images": ["a.png"]}, "field 'images' is not supported"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}, "turn 2: role 'bing'"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]},
            "turn 2: field 'content' is a NoneType",
        ),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "records.jsonl", INSTRUCTION, record)
    with pytest.raises(ValueError, match=rf"records\.jsonl, line 2(, |: ){message}"):
        load_records([path])


def test_the_template_follows_the_records() -> None:
    instruction, text, conversation, parts = (Record(form) for form in FORMS)
    for records, template in (
        ([instruction, text], "plain"),
        ([text, text], "none"),
        ([instruction, conversation], "chat"),
        ([text, parts], "chat"),
    ):
        assert choose_template(None, records) == template
        assert choose_template("none", records) == "none"
    assert choose_template("alpaca", [text, instruction]) == "alpaca"
    with pytest.raises(ValueError, match=r"prompt_template='chat' means nothing to .*texts that are taken as they are"):
        choose_template("chat", [text])


def test_the_last_question_of_a_record_is_shown() -> None:
    expected = [("Add. 1 2", "3"), ("1 + 2 =", " 3"), (USER["content"], ANSWER["content"])]
    assert [last_exchange(form) for form in FORMS[:3]] == expected
    assert last_exchange({"messages": [USER, ANSWER, {"role": "user", "content": "Thanks."}]}) == expected[2]
