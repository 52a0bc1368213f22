"""Records from local JSON or JSONL files and from the hub, checked one by one."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reflora_dist.files.local_names import no_such_path

from ..cluster.waiting import stage
from .forms import EXPECTED, Record, checked

# The first bytes of files that users give as JSON by mistake.
_OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}:]')
_DEEP = 100  # json gives up at about 1000


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
        loaded = [checked(value, place) for place, value in places]
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
    """Return whether the source is a file. Refuse what is neither a file, nor a folder, nor a possible hub name.

    Raises:
        ValueError: the source looks like a file and does not exist.
    """
    if problem := no_such_path(source):
        raise ValueError(f"dataset {source!r}: {problem}; give an existing JSON or JSONL file or a hub name")
    return os.path.isfile(source)


def parse_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Return (line number, value) of every element of a JSON array or JSONL file.

    Raises:
        ValueError: the file cannot be read; the message names the line.
    """
    text = _read_text(path)
    return _parse_array(text, path) if text.lstrip().startswith("[") else _parse_lines(text, path)


def load_hub(name: str, split: str, config: str | None = None, revision: str | None = None) -> Iterator[Any]:
    """Return the rows of one split of a data set on the hub or in a local folder.

    Raises:
        ValueError: the data set cannot be loaded, or a row cannot be read.
    """
    import datasets

    try:
        with stage("loading the data set", name):
            rows = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises many kinds; all mean that there is no data
        part = f"{split!r} of {config!r}" if config else repr(split)
        cause = error.__cause__ or error  # a DatasetGenerationError says only that there was an error
        raise ValueError(
            f"dataset {name!r}, split {part} cannot be loaded ({type(cause).__name__}: {cause}); check "
            "the name, the split and the network, or give a local JSON or JSONL file"
        ) from error
    return _readable(rows, name)


def _readable(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the rows. Their texts are decoded one by one, and an error names the row."""
    number = 0
    try:
        for number, row in enumerate(rows, start=1):  # noqa: B007
            yield row
    except (ValueError, OSError) as error:
        raise ValueError(
            f"dataset {name!r}, record {number + 1}: cannot be read ({error}); correct the data set's file"
        ) from error


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    for beginning, format_name in _OTHER_FORMATS.items():
        if content.startswith(beginning):
            raise ValueError(f"{path}: {format_name}, not UTF-8 text; give the JSON or JSONL that it holds, in UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error}); convert the file to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of every non-empty line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value, end = _decode(line, _skip(line, 0), path, number, first_line=number)
            end = _skip(line, end)
            if end < len(line):
                raise ValueError(
                    f"{path}, line {number}: not JSON (text behind the record at column {end + 1}); write one record "
                    "per line, or one array of records"
                )
            yield number, value


def _parse_array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of every element of the file's array. Decoding one by one gives the lines."""
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode(text, position, path, line, first_line=1)
        yield line, value
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}, line {line}: this record is not followed by ',' or ']'")
    behind = _skip(text, position + 1)
    if behind < len(text):
        line = 1 + text.count("\n", 0, behind)
        raise ValueError(f"{path}, line {line}: text behind the array; write one array, or one record per line")


def _decode(text: str, position: int, path: Path, line: int, first_line: int) -> tuple[Any, int]:
    """Return the JSON value at a position of ``text``, and the position behind it.

    Args:
        text: the whole file or one line of it.
        position: where the value begins.
        path: for error messages.
        line: number of the line in which the value begins.
        first_line: number of the text's first line.
    """
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg} at column {error.colno}); write one "
            "record per line, or one array of records"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
    except RecursionError as error:
        place = f"{path}, line {line}: {_deep_field(text[position:])}"
        raise ValueError(f"{place} is nested too deeply; the fields of a record are texts") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. ``json`` itself would keep the last of several equal keys without an error."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"field {name!r} is there twice; keep one of them")
        if isinstance(value, LongInteger):
            raise ValueError(f"field {name!r} is an integer of {len(value):,} digits; shorten it")
        fields[name] = value
    return fields


class LongInteger(str):
    """The digits of an integer that is too long for Python to convert."""


def _integer(digits: str) -> int | LongInteger:
    try:
        return int(digits)
    except ValueError:
        return LongInteger(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _deep_field(text: str) -> str:
    """Name the record's first field that holds more than ``_DEEP`` levels."""
    depth, field, last = 0, "", ""
    for token in map(re.Match.group, _TOKEN.finditer(text)):
        if token == ":":
            field = last if depth == 1 else field
        elif token in "[]{}":
            depth += 1 if token in "[{" else -1
            if depth > _DEEP:
                break
        else:
            last = token
    return f"field {json.loads(field)!r}" if field else "the record"


def _skip(text: str, position: int) -> int:
    """Return the position of the next character that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position
