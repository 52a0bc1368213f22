"""Reading instruction records: both file forms, and an error that names file, line and field for each mistake."""

from __future__ import annotations

import json
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
    ],
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
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_records([str(tmp_path / "binary.json")])


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
