"""Reading instruction records: both file forms, and an error that names file, line and field for each mistake."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.data.records import load_records, split_records

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


def test_lines_and_arrays_hold_the_same_records(tmp_path: Path) -> None:
    records = [GOOD, {"instruction": "Say a,b]", "output": "a\nb"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(records, indent=2), encoding="utf-8")
    expected = [GOOD, {"instruction": "Say a,b]", "input": "", "output": "a\nb"}]
    assert load_records([str(tmp_path / "lines.jsonl")]) == expected
    assert load_records([str(tmp_path / "array.json")]) == expected
    assert load_records([str(tmp_path / "lines.jsonl"), str(tmp_path / "array.json")]) == expected * 2


def test_a_data_set_folder_is_read_like_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert load_records([str(tmp_path / "hub")], split="train") == [GOOD]
    with pytest.raises(ValueError, match="split 'test' cannot be loaded"):
        load_records([str(tmp_path / "hub")], split="test")


def test_mistakes_in_a_data_set_folder_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    good = json.dumps(GOOD).encode() + b"\n"
    for bad, message in (
        (b'{"instruction": "caf\xe9", "input": "", "output": "b"}', "record 3: cannot be read .*codec can't decode"),
        (b'{"instruction": "a", "input": "", "output": " "}', "record 3: field 'output' is empty"),
        (
            b'{"instruction": "a", "input": "", "output": "x\\ud800"}',
            "cannot be loaded .*surrogate pair in string is invalid",
        ),
    ):
        (folder / "train.jsonl").write_bytes(good * 2 + bad + b"\n")
        with pytest.raises(ValueError, match=f"dataset '{folder}', .*{message}"):
            load_records([str(folder)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "line 2: field 'output' is missing"),
        ('[\n{"instruction": "a", "output": "b"},\n\n{"output": "b"}]', "line 4: field 'instruction' is missing"),
        ('{"instruction": "a", "output": " "}', "line 1: field 'output' is empty"),
        ('{"instruction": "a", "output": 3}', "line 1: field 'output' is a int, not a text"),
        ('{"instruction": "a", "input": ["x"], "output": "b"}', "field 'input' is a list"),
        ('"text"', "line 1: a str, not a record"),
        ('{"instruction": "a", "output": "b"}\n{"instruction"', "line 2: not JSON"),
        ('[{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b"}]', "not followed by"),
        ('[{"instruction": "a", "output": "b"},\n{"instruction" "a"}]', "line 2: not JSON"),
        ('[{"instruction": "a", "output": "b"}', "not followed by"),
        ("[", "not JSON"),
        ("", "is empty"),
        ("[]", "is empty"),
        ("\n\n", "is empty"),
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "x\\ud800"}',
            "line 2: field 'output' holds",
        ),
        ('{"instruction": "\\udc00 a", "output": "b"}', r"line 1: field 'instruction' holds '\\udc00' \(character 1\)"),
        ('{"instruction": "a", "input": "\\ud83d", "output": "b"}', "line 1: field 'input' holds"),
        ('{"instruction": "a", "input": [], "output": "b"}', "line 1: field 'input' is a list, not a text"),
        ('{"instruction": "a", "input": {}, "output": "b"}', "line 1: field 'input' is a dict, not a text"),
        ('{"instruction": "a", "input": 0, "output": "b"}', "line 1: field 'input' is a int, not a text"),
        ('{"instruction": "a", "input": false, "output": "b"}', "line 1: field 'input' is a bool, not a text"),
        ('\n{"instruction": "a", "output": "b", "output": "c"}', "line 2: field 'output' is there twice"),
        ('[\n{"instruction": "a", "x": {"y": 1, "y": 2}, "output": "b"}]', "line 2: field 'y' is there twice"),
        (
            '\n{"instruction": "a", "output": ' + "9" * 5000 + "}",
            "line 2: field 'output' is an integer of 5,000 digits",
        ),
        ('[\n\n{"instruction": "a", "id": -' + "9" * 5000 + "}]", "line 3: field 'id' is an integer of 5,001 digits"),
        (
            '\n{"instruction": "a", "output": ' + "[" * 50_000 + "]" * 50_000 + "}",
            "line 2: field 'output' is nested too",
        ),
        (
            '[\n{"a\\"{b": 1, "x": "[", "deep": ' + '{"k": ' * 5000 + "1" + "}" * 5001 + "]",
            "line 2: field 'deep' is nested",
        ),
        ("[" * 5000, "line 1: the record is nested too deeply"),
        ('{"instruction": "a", "output": "b"} {"instruction"', "line 1: not JSON .text behind the record at column 37"),
        ('[{"instruction": "a", "output": "b"}]\n[{}]', "line 2: text behind the array"),
    ],
    ids=lambda value: value[-40:],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_records([str(path)])
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl'.*no such file"):
        load_records([str(tmp_path / "absent.jsonl")])
    path = tmp_path / "binary.json"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"binary.json, line 2: not UTF-8 .*; convert the file to UTF-8"):
        load_records([str(path)])


@pytest.mark.parametrize(
    ("format_name", "encode"),
    [
        ("a gzip archive", gzip.compress),
        ("a bzip2 archive", bz2.compress),
        ("an xz archive", lzma.compress),
        ("a zstd archive", lambda content: b"\x28\xb5\x2f\xfd" + content),
        ("UTF-16", lambda content: content.decode().encode("utf-16")),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, format_name: str, encode: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(encode(json.dumps(GOOD).encode()))
    with pytest.raises(ValueError, match=f"records.jsonl: {format_name}, not UTF-8 text; give the JSON or JSONL"):
        load_records([str(path)])


def test_whole_surrogate_pairs_null_inputs_and_other_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lines = ['{"instruction": "\\ud83d\\ude00", "input": null, "output": "\\u0000b"}', json.dumps(GOOD), ""]
    for line_end in ("\n", "\r\n", "\r"):
        path.write_bytes(line_end.join(lines).encode())
        assert load_records([str(path)]) == [{"instruction": "\U0001f600", "input": "", "output": "\x00b"}, GOOD]


def test_records_know_their_places(tmp_path: Path) -> None:
    """Through shuffling and splitting, for the errors of what comes later."""
    path = tmp_path / "records.jsonl"
    path.write_text("\n" + "".join(json.dumps({**GOOD, "output": str(i)}) + "\n" for i in range(6)))
    for part in split_records(load_records([str(path)]), 0.5, seed=1):
        assert [r.place for r in part] == [f"{path}, line {int(r['output']) + 2}" for r in part]


def test_a_hub_name_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/no-such-data-set', split 'train' cannot be loaded"):
        load_records(["nobody/no-such-data-set"])


def test_the_split_sets_records_aside_without_losing_or_repeating_any() -> None:
    records = [{"instruction": str(i), "input": "", "output": str(i)} for i in range(20)]
    train, held_out = split_records(records, 0.25, seed=1)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted((r["output"] for r in train + held_out), key=int) == [r["output"] for r in records]
    assert split_records(records, 0.25, seed=1) == (train, held_out)
    assert split_records(records, 0.25, seed=2) != (train, held_out)
    for fraction, count in ((0.0, 20), (1.0, 20), (0.5, 1)):
        with pytest.raises(ValueError, match="eval_fraction"):
            split_records(records[:count], fraction, seed=1)
