"""Instruction records from local JSON or JSONL files and from the hub, checked one by one."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

EXPECTED = 'every record needs the texts {"instruction": ..., "input": ..., "output": ...}; "input" may be absent'


class Record(TypedDict):
    """One instruction, optional further input, and the answer to learn."""

    instruction: str
    input: str
    output: str


def load_records(sources: Sequence[str], split: str = "train") -> list[Record]:
    """Read and check the records of every source, in order.

    Args:
        sources: local JSON or JSONL files, local data set folders or hub names.
        split: which split of a hub data set (or folder) to read; a local file has only one.

    Raises:
        ValueError: a source does not exist, holds no record, or holds a record that cannot be used; the
            message names the file, the line and the field.
    """
    records: list[Record] = []
    for source in sources:
        if is_local_file(source):
            places = ((f"{source}, line {line}", value) for line, value in parse_file(Path(source)))
        else:
            rows = enumerate(load_hub(source, split), start=1)
            places = ((f"dataset {source!r}, record {number}", value) for number, value in rows)
        loaded = [_checked(value, place) for place, value in places]
        if not loaded:
            raise ValueError(f"dataset {source!r} is empty; {EXPECTED}")
        records.extend(loaded)
    return records


def split_records(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Shuffle with ``seed`` and set ``fraction`` of the records aside for evaluation, at least one.

    Raises:
        ValueError: the fraction is not between 0 and 1, or leaves nothing to train on.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction={fraction} must be between 0 and 1")
    shuffled = random.Random(seed).sample(records, len(records))
    held_out = max(1, round(fraction * len(shuffled)))
    if held_out >= len(shuffled):
        raise ValueError(f"eval_fraction={fraction} of {len(records)} records leaves none to train on; add records")
    return shuffled[held_out:], shuffled[:held_out]


def is_local_file(source: str) -> bool:
    """Whether it is a file; what is neither that, nor a folder, nor a possible name on the hub is refused.

    Raises:
        ValueError: it looks like a file and does not exist.
    """
    if os.path.isfile(source):
        return True
    looks_local = source.endswith((".json", ".jsonl")) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not os.path.isdir(source):
        raise ValueError(f"dataset {source!r}: no such file; give an existing JSON or JSONL file or a hub name")
    return False


def parse_file(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of everything in a JSON array or JSONL file.

    Raises:
        ValueError: the file cannot be read; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); convert the file to UTF-8") from error
    return _parse_array(text, path) if text.lstrip().startswith("[") else _parse_lines(text, path)


def load_hub(name: str, split: str, config: str | None = None, revision: str | None = None) -> Any:
    """One split of a data set of the hub, or of a local folder.

    Raises:
        ValueError: it cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises a dozen kinds; all mean that there is no data
        part = f"{split!r} of {config!r}" if config else repr(split)
        raise ValueError(
            f"dataset {name!r}, split {part} cannot be loaded ({type(error).__name__}: {error}); check "
            "the name, the split and the network, or give a local JSON or JSONL file"
        ) from error


def _parse_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every non-empty line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); "
                    "write one record per line, or one array of records"
                ) from error


def _parse_array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every element of the file's array; element by element to know the lines."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
        yield line, value
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}, line {line}: this record is not followed by ',' or ']'")


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def _checked(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a {type(value).__name__}, not a record; {EXPECTED}")
    for field in ("instruction", "output"):
        if field not in value:
            raise ValueError(f"{place}: field {field!r} is missing (found {sorted(value)}); {EXPECTED}")
    fields = {field: value.get(field) for field in ("instruction", "input", "output")}
    fields["input"] = fields["input"] or ""
    for field, content in fields.items():
        if not isinstance(content, str):
            raise ValueError(f"{place}: field {field!r} is a {type(content).__name__}, not a text; {EXPECTED}")
        if field != "input" and not content.strip():
            raise ValueError(f"{place}: field {field!r} is empty; remove the record or fill the field")
    return Record(**fields)  # type: ignore[typeddict-item]
