"""Rules that extract the answer from a generated text, as for the papers' commonsense and GSM8K tables.

Commonsense tasks: the answer is the first of the task's answer words anywhere in the text. Words are lower case, as in
the training files. The rule is that of ``commonsense_evaluate.py`` of LLM-Adapters
(github.com/AGI-Edgerunners/LLM-Adapters), which DoRA and RefLoRA use unchanged. "True" or "Option1" is no answer there,
and none here.

GSM8K: the answer is the number after "####", with which the data set marks its own answers (arXiv 2110.14168). Without
the mark it is the text's last number. Thousands separators are removed, and numbers are equal within 1e-3
(``evaluate.py`` of LLM-Adapters).
"""

from __future__ import annotations

import re

ANSWER_WORDS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}
NUMBER_TOLERANCE = 1e-3
_NUMBER = re.compile(r"-?\d+\.?\d*")


def extract_answer(task: str, text: str) -> str | None:
    """Return the answer in a generated text, or None if it holds none.

    Args:
        task: one of :data:`ANSWER_WORDS`, or "gsm8k".
        text: the model's text, without the prompt.
    """
    if task == "gsm8k":
        return _extract_number(text)
    found = re.search("|".join(ANSWER_WORDS[task]), text)
    return found[0] if found else None


def is_correct(task: str, answer: str | None, reference: str) -> bool:
    """Return whether an extracted answer equals the reference. For GSM8K both are numbers."""
    if answer is None:
        return False
    if task == "gsm8k":
        return abs(float(answer) - float(reference)) <= NUMBER_TOLERANCE
    return answer == reference


def _extract_number(text: str) -> str | None:
    text = text.replace(",", "")
    _, mark, marked = text.partition("####")
    # text after the answer, such as a further question that the model invents, is not part of it
    after_mark = _NUMBER.search(marked.partition("\n")[0]) if mark else None
    if after_mark:
        return after_mark[0]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
