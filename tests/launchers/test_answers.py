"""The rules of extraction on recorded texts: ordinary answers, and all that models write instead of them."""

from __future__ import annotations

import json

import pytest

from launchers.evaluation.answer_rules import ANSWER_WORDS, extract_answer, is_correct
from tests.support.launchers import DATA, needs_data

RECORDED = [
    # as trained
    ("boolq", "the correct answer is true", "true"),
    ("piqa", "the correct answer is solution2", "solution2"),
    ("social_i_qa", "the correct answer is answer3", "answer3"),
    ("hellaswag", "the correct answer is ending4", "ending4"),
    ("winogrande", "the correct answer is option2", "option2"),
    ("ARC-Easy", "the correct answer is answer5", "answer5"),
    ("ARC-Challenge", "the correct answer is answer1", "answer1"),
    ("openbookqa", "the correct answer is answer4", "answer4"),
    # without the sentence, with line breaks, run together, an explanation behind it
    ("boolq", "false", "false"),
    ("winogrande", "\n\noption1\n", "option1"),
    ("piqa", "answer:solution1.", "solution1"),
    ("openbookqa", "the correct answer is answer2 because a desert is dry", "answer2"),
    ("ARC-Easy", "answer3: the roots may break the concrete", "answer3"),
    # repeated, and several different ones: the first counts
    ("boolq", "the correct answer is true the correct answer is true", "true"),
    ("hellaswag", "ending2/ending3\n\nthe correct answer is ending3", "ending2"),
    ("winogrande", "the correct answer is option1\n\n### Instruction:\nPlease choose option2", "option1"),
    ("boolq", "it is not true, so the correct answer is false", "true"),
    ("ARC-Challenge", "not answer4 but answer1", "answer4"),
    # inside a longer word
    ("boolq", "this is untrue", "true"),
    ("social_i_qa", "answer12", "answer1"),
    # upper case, other words, numbers alone, nothing, cut off
    ("boolq", "True", None),
    ("boolq", "yes", None),
    ("piqa", "Solution1", None),
    ("winogrande", "OPTION2", None),
    ("winogrande", "option3", None),
    ("winogrande", "option 2", None),
    ("hellaswag", "the correct answer is ending5", None),
    ("hellaswag", "the correct answer is answer1", None),
    ("ARC-Easy", "the correct answer is 3", None),
    ("openbookqa", "the correct answer is", None),
    ("social_i_qa", "the correct answer is ans", None),
    ("boolq", "", None),
    # numbers: marked
    ("gsm8k", "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", "18"),
    ("gsm8k", "#### 1,319", "1319"),
    ("gsm8k", "#### $70,000.", "70000."),
    ("gsm8k", "####-5", "-5"),
    ("gsm8k", "so he pays 3.\n#### 3\n\n### Instruction:\nTom has 12 apples.\n#### 12", "3"),
    ("gsm8k", "20% of 50 is 10\n#### 10 dollars, 2 for each of 5", "10"),
    # numbers: not marked, the last one counts
    ("gsm8k", "The answer is 576.", "576."),
    ("gsm8k", "24 * 24 = 576 tiles", "576"),
    ("gsm8k", "He has $1,234,567.89 left", "1234567.89"),
    ("gsm8k", "the temperature fell to -12 degrees", "-12"),
    ("gsm8k", "it takes 2.5 hours", "2.5"),
    ("gsm8k", "10-4=6", "6"),
    ("gsm8k", "10-4", "-4"),
    ("gsm8k", "1/2", "2"),
    ("gsm8k", "7 eggs ####", "7"),
    ("gsm8k", "7 eggs\n####\n", "7"),
    ("gsm8k", "eighteen", None),
    ("gsm8k", "", None),
]


@pytest.mark.parametrize(("task", "text", "answer"), RECORDED)
def test_recorded_texts(task: str, text: str, answer: str | None) -> None:
    assert extract_answer(task, text) == answer


@pytest.mark.parametrize(
    ("task", "answer", "reference", "correct"),
    [
        ("boolq", "true", "true", True),
        ("boolq", "true", "false", False),
        ("boolq", None, "false", False),
        ("gsm8k", "576.", "576", True),
        ("gsm8k", "576.0005", "576", True),
        ("gsm8k", "576.002", "576", False),
        ("gsm8k", "-5", "5", False),
        ("gsm8k", "70000.", "70000.0", True),
        ("gsm8k", None, "0", False),
    ],
)
def test_answers_are_compared_as_words_or_as_numbers(
    task: str, answer: str | None, reference: str, correct: bool
) -> None:
    assert is_correct(task, answer, reference) == correct


@needs_data
@pytest.mark.parametrize("task", sorted({*ANSWER_WORDS} - {"hellaswag"}))
def test_every_reference_output_is_its_own_answer(task: str) -> None:
    """The text that the models learn to write, of all records: the rule finds exactly the reference."""
    for record in json.loads((DATA / "commonsense" / task / "test.json").read_text()):
        answer = extract_answer(task, record["output"])
        assert answer == record["answer"] and is_correct(task, answer, record["answer"])


@needs_data
def test_every_solution_of_gsm8k_is_its_own_answer() -> None:
    lines = (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()
    for solution in (json.loads(line)["answer"] for line in lines):
        reference = solution.rsplit("#### ", 1)[1].replace(",", "")
        assert is_correct("gsm8k", extract_answer("gsm8k", solution), reference), solution
    assert len(lines) == 1319
