"""The questions of the evaluation tasks: local files, the hub's rows in the same wording, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.evaluation import questions
from launchers.evaluation.answer_rules import ANSWER_WORDS
from launchers.evaluation.questions import TASKS, Question, load_questions
from tests.support.launchers import DATA, needs_data

# A row of each set as its authors wrote it, and the place of the same question in the local file.
HUB_ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "boolq": (
        3,
        {
            "question": "is harry potter and the escape from gringotts a roller coaster ride",
            "answer": True,
            "passage": "Harry Potter and the Escape from Gringotts is an indoor steel roller coaster ...",
        },
    ),
    "piqa": (
        3,
        {
            "goal": "Make outdoor pillow.",
            "sol1": "Blow into tin can and tie with rubber band.",
            "sol2": "Blow into trash bag and tie with rubber band.",
            "label": 1,
        },
    ),
    "social_i_qa": (
        3,
        {
            "context": "Jordan was in charge of taking the food on the camping trip and left all the food at home.",
            "question": "How would Jordan feel afterwards?",
            "answerA": "horrible that he let his friends down on the camping trip",
            "answerB": "happy that he doesn't need to do the cooking on the trip",
            "answerC": "very proud and accomplished about the camping trip",
            "label": "1",
        },
    ),
    "winogrande": (
        3,
        {
            "sentence": "Terry tried to bake the eggplant in the toaster oven but the _ was too big.",
            "option1": "eggplant",
            "option2": "toaster",
            "answer": "1",
        },
    ),
    "ARC-Easy": (
        3,
        {
            "question": "Which characteristic describes the texture of a kitten's fur?",
            "choices": {"text": ["gray", "warm", "long", "soft"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
    ),
    "ARC-Challenge": (
        3,
        {
            "question": "A physicist wants to determine the speed a car must reach to jump over a ramp. The physicist "
            "conducts three trials. In trials two and three, the speed of the car is increased by 20 miles per hour. "
            "What is the physicist investigating when he changes the speed?",
            "choices": {
                "text": [
                    "the control",
                    "the hypothesis statement",
                    "the dependent (responding) variable",
                    "the independent (manipulated) variable",
                ],
                "label": ["1", "2", "3", "4"],
            },
            "answerKey": "4",
        },
    ),
    "openbookqa": (
        3,
        {
            "question_stem": "Oak tree seeds are planted and a sidewalk is paved right next to that spot, until "
            "eventually, the tree is tall and the roots must extend past the sidewalk, which means",
            "choices": {
                "text": [
                    "roots may be split",
                    "roots may begin to die",
                    "parts may break the concrete",
                    "roots may fall apart",
                ],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "C",
        },
    ),
}


def _from_hub(monkeypatch: pytest.MonkeyPatch, task: str, rows: list[dict[str, Any]]) -> list[Question]:
    monkeypatch.setattr(questions, "load_hub", lambda *_: rows)
    return load_questions(task, "hub", None)


@needs_data
@pytest.mark.parametrize("task", sorted(HUB_ROWS))
def test_rows_of_the_hub_get_the_wording_of_the_local_files(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, row = HUB_ROWS[task]
    assert _from_hub(monkeypatch, task, [row])[0] == load_questions(task, None, str(DATA))[place]


def test_hellaswag_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "activity_label": "Playing drums",
        "ctx": "People are standing behind large drums. A man",
        "endings": ["plays a bag pipe.", "starts to play.", "begins a set.", "sings."],
        "label": "2",
    }
    assert _from_hub(monkeypatch, "hellaswag", [row]) == [
        Question(
            "Please choose the correct ending to complete the given sentence: Playing drums: People are standing "
            "behind large drums. A man\n\nEnding1: plays a bag pipe. Ending2: starts to play. Ending3: begins a set. "
            "Ending4: sings.\n\nAnswer format: ending1/ending2/ending3/ending4",
            "",
            "ending3",
        )
    ]


@needs_data
def test_gsm8k_is_the_same_from_its_file_and_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    local = load_questions("gsm8k", None, str(DATA))
    rows = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()]
    assert _from_hub(monkeypatch, "gsm8k", rows) == local
    assert (len(local), local[0].answer, local[1].answer) == (1319, "18", "3")


@needs_data
def test_all_local_files_are_read() -> None:
    counts = {task: len(load_questions(task, None, str(DATA))) for task in TASKS if task != "hellaswag"}
    assert counts == {
        "boolq": 3270,
        "piqa": 1838,
        "social_i_qa": 1954,
        "winogrande": 1267,
        "ARC-Easy": 2376,
        "ARC-Challenge": 1172,
        "openbookqa": 500,
        "gsm8k": 1319,
    }


def test_layouts_of_local_files(tmp_path: Path) -> None:
    """Under the folder, under its commonsense folder, by name; with and without an input; GSM8K's other form."""
    record = {"instruction": "Is it?", "input": "a thing", "output": "the correct answer is true", "answer": "true"}
    for path in (tmp_path / "boolq" / "test.json", tmp_path / "b" / "commonsense" / "boolq" / "test.json"):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([record]))
        expected = [Question("Is it?", "a thing", "true")]
        assert load_questions("boolq", str(path), None) == expected
        assert load_questions("boolq", None, str(path.parent.parent)) == expected
    assert load_questions("boolq", None, str(tmp_path / "b")) == expected
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_text(json.dumps([{"instruction": "How many?", "answer": "576.0"}]))
    assert load_questions("gsm8k", None, str(tmp_path)) == [Question("How many?", "", "576.0")]


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("boolq", {"instruction": "Is it?", "answer": "option1"}, "answer 'option1' is not one of true, false"),
        ("gsm8k", {"instruction": "How many?", "answer": "ten"}, "answer 'ten' is not a number"),
        ("gsm8k", {"question": "How many?", "answer": "It is 10."}, "answer 'It is 10.' is not a number"),
        ("boolq", {"instruction": "Is it?"}, "needs the texts"),
        ("boolq", {"instruction": "", "answer": "true"}, "field 'instruction' is empty; a record needs the texts"),
        ("boolq", ["Is it?"], "a str, not a record; a record needs the texts"),
        ("boolq", {"instruction": "Is it?", "answer": True}, "field 'answer' is a bool, not a text"),
        ("boolq", {"instruction": "Is it?", "input": [], "answer": "true"}, "field 'input' is a list, not a text"),
        ("boolq", {"instruction": "Is it?", "input": ["x"], "answer": "true"}, "field 'input' is a list, not a text"),
        (
            "boolq",
            {"instruction": "Is it \ud800?", "answer": "true"},
            "field 'instruction' holds .*half of a surrogate",
        ),
        ("gsm8k", {"question": "How \udfff?", "answer": "#### 1"}, "field 'question' holds .*half of a surrogate"),
        ("gsm8k", {"question": "How many?", "answer": 10}, "field 'answer' is a int, not a text"),
        ("gsm8k", {"instruction": "How many?", "answer": "nan"}, "answer 'nan' is not a number"),
        ("gsm8k", {"instruction": "How many?", "answer": "1e999"}, "answer '1e999' is not a number"),
    ],
)
def test_unusable_records_are_named(tmp_path: Path, task: str, record: Any, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_questions(task, str(path), None)
    assert f"{path}, line 1" in str(caught.value)


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hellaswag/test.json.*--tasks hellaswag=FILE, or hellaswag=hub"):
        load_questions("hellaswag", None, str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere.json cannot be read"):
        load_questions("hellaswag", str(tmp_path / "nowhere.json"), None)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match=r"empty.json holds no record"):
        load_questions("boolq", str(tmp_path / "empty.json"), None)


def test_file_mistakes_are_named_as_in_training(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    for content, message in (
        ('[\n{"instruction": "Is it?", "answer": "true", "answer": "false"}]', "line 2: field 'answer' is there twice"),
        (
            '[\n{"instruction": "Is it?", "answer": ' + "[" * 5000 + "]" * 5000 + "}]",
            "line 2: field 'answer' is nested",
        ),
        ('\n{"instruction": "Is it?", "answer": ' + "1" * 5000 + "}", "line 2: field 'answer' is an integer of 5,000"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"test.json, {message}"):
            load_questions("boolq", str(path), None)


def test_rows_of_another_data_set_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"goal": "Sit.", "sol1": "On a chair.", "sol2": "On a cat.", "label": 0}
    for row in ({"goal": "Sit."}, {**good, "label": ""}, {**good, "label": None}):
        with pytest.raises(ValueError, match=r"ybisk/piqa, record 2: not a row of the published data set \(\w+Error: "):
            _from_hub(monkeypatch, "piqa", [good, row])


def test_every_task_has_a_set_on_the_hub() -> None:
    assert set(questions._HUB) == {*ANSWER_WORDS, "gsm8k"} == set(TASKS)
