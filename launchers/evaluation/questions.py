"""Questions of the evaluation tasks, from local files in the layout of LLM-Adapters or from the hub.

A local task is ``<task>/test.json``, a list of {"instruction", "input", "output", "answer"}, in the data folder or its
``commonsense`` folder. GSM8K may be ``gsm8k/test.jsonl`` with {"question", "answer"} per line. Data sets of the hub are
brought into the same wording, and their splits are those of LLM-Adapters' files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..data.forms import require_record, text_field
from ..data.records import load_hub, parse_file
from .answer_rules import ANSWER_WORDS

TASKS = (*ANSWER_WORDS, "gsm8k")
FROM_HUB = "hub"
_EXPECTED = 'a record needs the texts {"instruction": ..., "answer": ...}, "input" may be absent'


@dataclasses.dataclass(frozen=True)
class Question:
    """One question. ``answer`` is the reference for the extracted answer, ``place`` is for error messages."""

    instruction: str
    input: str
    answer: str
    place: str = dataclasses.field(default="a question", compare=False)

    @property
    def texts(self) -> tuple[str, str, str]:
        """All fields except ``place``."""
        return self.instruction, self.input, self.answer


def load_questions(task: str, source: str | None, data: str | None) -> list[Question]:
    """Return all questions of a task, in the order of their source.

    Args:
        task: one of :data:`TASKS`.
        source: a JSON or JSONL file, "hub", or None for the file under ``data``, or the hub without ``data``.
        data: folder with a folder for every task, or None.

    Raises:
        ValueError: the task's file is missing, or a record cannot be used.
    """
    rows: Iterable[tuple[str, Any]]
    if source == FROM_HUB or (source is None and data is None):
        hub = _HUB[task]
        name = hub.name
        loaded = load_hub(name, hub.split, hub.config, hub.revision)
        places = ((f"{name}, record {i}", row) for i, row in enumerate(loaded, start=1))
        rows = ((place, _converted(hub, row, place)) for place, row in places)
    else:
        path = Path(source) if source is not None else _local_file(task, Path(str(data)))
        name = str(path)
        rows = ((f"{path}, line {line}", value) for line, value in parse_file(path))
    questions = [_question(task, value, place) for place, value in rows]
    if not questions:
        raise ValueError(f"{task}: {name} holds no record")
    return questions


def _local_file(task: str, data: Path) -> Path:
    candidates = [data / part / task / "test.json" for part in ("", "commonsense")]
    if task == "gsm8k":
        candidates.insert(0, data / task / "test.jsonl")
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"{task}: none of {', '.join(map(str, candidates))} exists; give --tasks {task}=FILE, or {task}={FROM_HUB} "
        "to take it from the hub"
    )


def _converted(hub: _HubSet, row: Any, place: str) -> Any:
    try:
        return hub.convert(row)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{place}: not a row of the published data set ({type(error).__name__}: {error}); give a local file"
        ) from error


def _question(task: str, row: Any, place: str) -> Question:
    """Check a record in either form and return its question.

    Raises:
        ValueError: a field is missing or no text, or extraction could never find the answer.
    """
    require_record(row, place, _EXPECTED)
    solved = task == "gsm8k" and "question" in row  # GSM8K's own form
    asked = "question" if solved else "instruction"
    texts = {field: text_field(row, field, place, _EXPECTED) for field in (asked, "answer")}
    for field, text in texts.items():
        if not text.strip():
            raise ValueError(f"{place}: field {field!r} is empty; {_EXPECTED}")
    further = "" if row.get("input") is None else text_field(row, "input", place, _EXPECTED)
    answer = texts["answer"]
    if solved:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    if not _is_answer(task, answer):
        expected = "a number" if task == "gsm8k" else "one of " + ", ".join(ANSWER_WORDS[task])
        raise ValueError(f"{place}: answer {answer!r} is not {expected}; is this a file of {task}?")
    return Question(texts[asked], further, answer, place)


def _is_answer(task: str, answer: str) -> bool:
    if task != "gsm8k":
        return answer in ANSWER_WORDS[task]
    try:
        return math.isfinite(float(answer))
    except ValueError:
        return False


def _choice(question: str, word: str, choices: Sequence[str], correct: int, gaps: tuple[str, str]) -> dict[str, str]:
    """Return a question in the wording of LLM-Adapters' files.

    Args:
        question: the question, with the sentence that introduces it.
        word: the name of a choice, such as "answer".
        choices: the texts of the choices.
        correct: number of the right choice, from 1.
        gaps: the text between two choices, and the text after the last.
    """
    names = [f"{word}{number}" for number in range(1, len(choices) + 1)]
    listed = gaps[0].join(f"{name.capitalize()}: {choice}" for name, choice in zip(names, choices, strict=True))
    instruction = f"Please choose the correct {question}\n\n{listed}{gaps[1]}Answer format: {'/'.join(names)}"
    return {"instruction": instruction, "answer": f"{word}{correct}"}


def _boolq(row: Any) -> dict[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return {"instruction": f"{question}\n\nAnswer format: true/false", "answer": str(row["answer"]).lower()}


def _piqa(row: Any) -> dict[str, str]:
    choices = [row["sol1"], row["sol2"]]
    question = f"solution to the question: {row['goal']}"
    return _choice(question, "solution", choices, int(row["label"]) + 1, ("\n\n", "\n\n"))


def _social_i_qa(row: Any) -> dict[str, str]:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    question = f"answer to the question: {row['context']} {row['question']}"
    return _choice(question, "answer", choices, int(row["label"]), (" ", "\n\n"))


def _hellaswag(row: Any) -> dict[str, str]:
    question = f"ending to complete the given sentence: {row['activity_label']}: {row['ctx']}"
    return _choice(question, "ending", row["endings"], int(row["label"]) + 1, (" ", "\n\n"))


def _winogrande(row: Any) -> dict[str, str]:
    choices = [row["option1"], row["option2"]]
    question = f"answer to fill in the blank to complete the given sentence: {row['sentence']}"
    return _choice(question, "option", choices, int(row["answer"]), (" ", " "))


def _science(row: Any) -> dict[str, str]:
    """Convert ARC and OpenBookQA, whose choices are labelled A, B, C, ... or 1, 2, 3, ..."""
    question = f"answer to the question: {row.get('question') or row.get('question_stem')}"
    correct = row["choices"]["label"].index(row["answerKey"]) + 1
    return _choice(question, "answer", row["choices"]["text"], correct, (" ", "\n\n"))


def _as_it_is(row: Any) -> Any:
    return row


@dataclasses.dataclass(frozen=True)
class _HubSet:
    """A data set of the hub, and the function that converts its rows."""

    name: str
    split: str
    convert: Callable[[Any], Any]
    config: str | None = None
    revision: str | None = None


# The splits are those of LLM-Adapters' test files. Two of the original sets are scripts, which `datasets` 4 no longer
# runs. PIQA's converted branch and a mirror of Social IQa replace them.
_HUB = {
    "boolq": _HubSet("google/boolq", "validation", _boolq),
    "piqa": _HubSet("ybisk/piqa", "validation", _piqa, revision="refs/convert/parquet"),
    "social_i_qa": _HubSet("lighteval/siqa", "validation", _social_i_qa),
    "hellaswag": _HubSet("Rowan/hellaswag", "validation", _hellaswag),
    "winogrande": _HubSet("allenai/winogrande", "validation", _winogrande, config="winogrande_xl"),
    "ARC-Easy": _HubSet("allenai/ai2_arc", "test", _science, config="ARC-Easy"),
    "ARC-Challenge": _HubSet("allenai/ai2_arc", "test", _science, config="ARC-Challenge"),
    "openbookqa": _HubSet("allenai/openbookqa", "test", _science, config="main"),
    "gsm8k": _HubSet("openai/gsm8k", "test", _as_it_is, config="main"),
}
