"""Files of answers: one JSONL file per rank, so that a stopped evaluation can continue."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from reflora_dist.files.open_files import read_json, readable
from reflora_dist.files.records import require_fields

SETTINGS_FILE = "settings.json"
_REMEDY = "delete the folder, or give another --output_dir"
Key = tuple[str, int]  # the task, and the question's index in it


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder whose answers were made with other settings.

    Args:
        folder: the folder of the answers.
        settings: the settings that decide an answer. Dictionaries may have further keys in the folder.

    Raises:
        ValueError: a setting differs; the message names it.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    before = read_json(path, _REMEDY)
    for name, value in settings.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            value = {key: entry for key, entry in value.items() if key in old}
            old = {key: entry for key, entry in old.items() if key in value}
        if old != value:
            raise ValueError(
                f"output_dir={str(folder)!r} holds answers made with {name}={old!r}, not {value!r}; give another "
                "--output_dir, or delete this one"
            )


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings for later runs. Entries of dictionaries are added to those that are there."""
    path = folder / SETTINGS_FILE
    before = read_json(path, _REMEDY) if path.is_file() else {}
    merged = {n: {**before.get(n, {}), **v} if isinstance(v, dict) else v for n, v in settings.items()}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(path)


def read_answers(folder: Path) -> dict[Key, dict[str, Any]]:
    """Return every finished answer in the folder, of all ranks of all runs.

    Raises:
        ValueError: a line is no answer. The last line may be unfinished, as a killed run leaves it.
    """
    answers: dict[Key, dict[str, Any]] = {}
    for path in sorted(folder.glob("answers.rank*.jsonl")):
        with readable(path, _REMEDY):
            lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # the text after the last line break is unfinished
            try:
                answer = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not an answer ({error}); delete the file") from error
            require_fields(answer, {"task": str, "index": int}, f"{path}, line {number},", "delete the file")
            if not isinstance(answer.get("correct"), bool) or "answer" not in answer:
                raise ValueError(f"{path}, line {number}, is damaged (correct or answer is missing): delete the file")
            answers[answer["task"], answer["index"]] = answer
    return answers


class AnswerFile:
    """Appends one rank's answers to its file. Each call of :meth:`add` writes whole lines."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"answers.rank{rank}.jsonl"
        self._file: TextIO | None = None

    def __enter__(self) -> AnswerFile:
        if self.path.is_file():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                self.path.write_bytes(content[:whole])
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        assert self._file is not None
        self._file.write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
