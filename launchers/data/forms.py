"""The forms of a record: an instruction with its answer, a prompt with its completion, or a conversation.

Each record is recognized by its own fields, so that files and data sets of different forms can be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

EXPECTED = (
    'a record needs the fields {"instruction": ..., "input": ..., "output": ...}, where "input" may be absent, or '
    '{"prompt": ..., "completion": ...}, or {"messages": [{"role": ..., "content": ...}, ...]}'
)
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# fields of conversations that change what the model sees; without them it would be trained on something else
_UNSUPPORTED = ("tools", "functions", "documents", "images", "image", "videos", "video", "audio", "audios")


class Record(dict[str, Any]):
    """One record. ``place`` is where it was read, for error messages.

    It has the texts ``instruction``, ``input`` and ``output``; or ``prompt`` and ``completion``, both texts or both
    lists of turns; or ``messages``, a list of turns. A turn is ``{"role": ..., "content": ...}``.
    """

    place = "a record"


def conversation_of(record: Mapping[str, Any]) -> tuple[list[dict[str, str]], int] | None:
    """Return the turns of a conversation, and how many at the beginning are no answers; None for other records."""
    if "messages" in record:
        return record["messages"], 0
    if isinstance(record.get("prompt"), list):
        return record["prompt"] + record["completion"], len(record["prompt"])
    return None


def is_text(record: Mapping[str, Any]) -> bool:
    """Return whether the record is a prompt and a completion, which are taken as they are."""
    return isinstance(record.get("prompt"), str)


def last_exchange(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return the texts of a record's last question and its answer, to be shown."""
    conversation = conversation_of(record)
    if conversation is not None:
        turns, _ = conversation
        last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
        return turns[last - 1]["content"], turns[last]["content"]
    if is_text(record):
        return record["prompt"], record["completion"]
    return f"{record['instruction']} {record['input']}", record["output"]


def checked(value: Any, place: str) -> Record:
    """Return a parsed value as a record.

    Raises:
        ValueError: the value is no record of a known form, or cannot be trained on; the message names the field.
    """
    require_record(value, place, EXPECTED)
    record = Record(_FORMS[_form(value, place)](value, place))
    record.place = place
    return record


def text_field(row: Mapping[str, Any], field: str, place: str, expected: str) -> str:
    """Return the text in a field of a record.

    Args:
        row: the record.
        field: the field's name.
        place: where the record was read, for error messages.
        expected: what a record needs, for error messages.

    Raises:
        ValueError: the field is missing, or holds no text that a tokenizer can encode.
    """
    if field not in row:
        raise ValueError(f"{place}: field {field!r} is missing (found {sorted(row)}); {expected}")
    content = row[field]
    if not isinstance(content, str):
        raise ValueError(f"{place}: field {field!r} is a {type(content).__name__}, not a text; {expected}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: field {field!r} holds {content[error.start]!r} (character {error.start + 1}), half of a "
            "surrogate pair, which is no text; write the whole character or remove it"
        ) from error
    return content


def require_record(value: Any, place: str, expected: str) -> None:
    """Refuse a value that is no JSON object.

    Raises:
        ValueError: the value is no JSON object.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a {type(value).__name__}, not a record; {expected}")


def _form(value: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Return the form whose fields the record has. Data sets of several forms fill the other fields with None."""
    found = {name for name, content in value.items() if content is not None}
    whole = [form for form in _FORMS if found.issuperset(form)]
    if len(whole) > 1:
        fields = " and ".join("/".join(form) for form in whole)
        raise ValueError(f"{place}: the record has two forms, {fields}; remove the fields of one")
    begun = [form for form in _FORMS if found.intersection(form)]
    return (whole or begun or [_INSTRUCTION])[0]


def _instruction(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    fields = {
        "instruction": _filled(value, "instruction", place),
        "input": "",
        "output": _filled(value, "output", place),
    }
    if value.get("input") is not None:
        fields["input"] = text_field(value, "input", place, EXPECTED)
    return fields


def _prompt(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    lists = [name for name in ("prompt", "completion") if isinstance(value.get(name), list)]
    if not lists:
        return {name: _filled(value, name, place) for name in ("prompt", "completion")}
    if len(lists) == 1:
        raise ValueError(f"{place}: field {lists[0]!r} is a list of turns and the other is not: both must be")
    _refuse_unsupported(value, place)
    fields = {name: _turns(value[name], place, f"{name} turn") for name in lists}
    _require_answer(fields["prompt"] + fields["completion"], len(fields["prompt"]), place)
    return fields


def _messages(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    _refuse_unsupported(value, place)
    turns = _turns(value["messages"], place, "turn")
    _require_answer(turns, 0, place)
    return {"messages": turns}


def _sharegpt(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    turns = value["conversations"]
    if isinstance(turns, list) and all(isinstance(turn, dict) and "from" in turn for turn in turns):
        named = [dict(turn) for turn in turns]
        for turn in named:
            role = turn.pop("from")
            turn |= {"role": _SHAREGPT_ROLES.get(str(role), role), "content": turn.pop("value", None)}
        turns = named
    return _messages({**value, "messages": turns}, place)


_INSTRUCTION = ("instruction", "output")
_FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    _INSTRUCTION: _instruction,
    ("prompt", "completion"): _prompt,
    ("messages",): _messages,
    ("conversations",): _sharegpt,
}


def _filled(value: Mapping[str, Any], field: str, place: str) -> str:
    text = text_field(value, field, place, EXPECTED)
    if not text.strip():
        raise ValueError(f"{place}: field {field!r} is empty; remove the record or fill the field")
    return text


def _refuse_unsupported(value: Mapping[str, Any], place: str) -> None:
    for name in _UNSUPPORTED:
        if value.get(name):
            raise ValueError(
                f"{place}: field {name!r} is not supported, and without it the model would be trained on another "
                "conversation; remove the field or the record"
            )


def _turns(value: Any, place: str, word: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise ValueError(f"{place}: the conversation is a {type(value).__name__}, not a list of turns; {EXPECTED}")
    if not value:
        raise ValueError(f"{place}: the conversation has no turn; remove the record")
    return [_turn(turn, f"{place}, {word} {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, place: str) -> dict[str, str]:
    require_record(turn, place, EXPECTED)
    role, content = turn.get("role"), turn.get("content")
    if role in ("tool", "function") or turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"{place}: calls of tools are not supported; remove the record, or write them as text")
    if role not in ROLES:
        raise ValueError(f"{place}: role {role!r} is unknown; the roles are {', '.join(ROLES)}")
    if isinstance(content, list):
        raise ValueError(
            f"{place}: the content is a list of parts (of images, say), and only a text is supported; write it as one "
            "text, or remove the record"
        )
    for name, further in turn.items():
        if name not in ("role", "content") and further not in (None, "", [], {}):
            raise ValueError(f"{place}: field {name!r} of a turn is not supported; remove it or the record")
    text = text_field(turn, "content", place, EXPECTED)
    if role != "system" and not text.strip():
        raise ValueError(f"{place}: the content is empty; remove the turn or the record")
    return {"role": role, "content": text}


def _require_answer(turns: list[dict[str, str]], given: int, place: str) -> None:
    if all(turn["role"] != "assistant" for turn in turns[given:]):
        part = "completion" if given else "conversation"
        raise ValueError(f"{place}: the {part} has no turn of the assistant, so nothing is learnt; remove the record")
    if turns[0]["role"] == "assistant":
        raise ValueError(
            f"{place}: the conversation begins with the assistant, who answers nothing yet; put a turn of the user "
            "before it, or remove that turn"
        )
