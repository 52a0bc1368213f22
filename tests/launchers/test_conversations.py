"""Conversations by the tokenizer's chat template: answers are learnt, each with its end of turn, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launchers.data.conversations import encode_chat_prompt, encode_conversation, end_of_turn
from launchers.data.records import Record
from launchers.data.tokenization import (
    IGNORE_INDEX,
    TokenizationSettings,
    cached_examples,
    encode_questions,
    tokenize,
)
from tests.support.chat_templates import (
    ENDS,
    LOOKING_AHEAD,
    LOOKING_AHEAD_MARKED,
    TEMPLATES,
    chat_tokenizer,
)
from tests.support.launchers import TOKENIZERS, fast_tokenizer

CHAT = TokenizationSettings(prompt_template="chat")
USER, ANSWER = {"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of items."}
SYSTEM = {"role": "system", "content": "Be short."}
CONVERSATION = [USER, ANSWER, {"role": "user", "content": "And a set?"}, {"role": "assistant", "content": "A bag."}]


@pytest.fixture(params=[(template, kind) for template in TEMPLATES for kind in sorted(TOKENIZERS)], ids="-".join)
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str]:
    """A tokenizer, and the text of its end of turn."""
    template, kind = request.param
    tokenizer = chat_tokenizer(tmp_path, template, kind)
    return tokenizer, ENDS[template] or tokenizer.eos_token


def _answers(tokenizer: Any, turns: list[dict[str, str]], given: int = 0) -> list[str]:
    ids, spans = encode_conversation(tokenizer, turns, given, "a record")
    return [tokenizer.decode(ids[start:end]).strip() for start, end in spans]


def test_an_instruction_becomes_the_users_turn(chat: Any) -> None:
    tokenizer, end = chat
    record: Any = {"instruction": "What does add do?", "input": "add(a, b)", "output": "Return the sum."}
    (example,) = tokenize(tokenizer, [record], CHAT)
    learnt = [label for label in example["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(learnt).replace(" ", "") == f"Returnthesum.{end}"
    before = example["input_ids"][: example["labels"].index(learnt[0])]
    assert "What does add do?\n\nadd(a, b)" in tokenizer.decode(before)
    # generation goes on from what stood before the answer in training
    assert encode_questions(tokenizer, [("What does add do?", "add(a, b)")], "chat") == [before]


def test_the_start_token_is_there_once_if_the_template_writes_it(tmp_path: Path) -> None:
    record: Any = {"instruction": "Say it.", "input": "", "output": "It."}
    for template, count in (("headers", 1), ("chatml", 0)):
        tokenizer = chat_tokenizer(tmp_path / template, template, "sentencepiece")
        assert tokenizer("Say it.")["input_ids"][0] == tokenizer.bos_token_id
        (example,) = tokenize(tokenizer, [record], CHAT)
        assert example["input_ids"].count(tokenizer.bos_token_id) == count
        assert encode_questions(tokenizer, [("Say it.", "")], "chat")[0].count(tokenizer.bos_token_id) == count


def test_every_answer_of_a_conversation_is_learnt(chat: Any) -> None:
    tokenizer, end = chat
    answers = [answer.replace(" ", "") for answer in _answers(tokenizer, CONVERSATION)]
    assert answers == [f"Arowofitems.{end}", f"Abag.{end}"]
    assert [answer.replace(" ", "") for answer in _answers(tokenizer, CONVERSATION, given=3)] == answers[1:]
    ids, spans = encode_conversation(tokenizer, CONVERSATION, 0, "a record")
    for turn, (start, _) in zip((1, 3), spans, strict=True):
        assert encode_chat_prompt(tokenizer, CONVERSATION[:turn]) == ids[:start]
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_the_end_of_turn_ends_generation(chat: Any) -> None:
    tokenizer, end = chat
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == end


def test_ordinary_text_may_end_a_turn(tmp_path: Path) -> None:
    """Then no single token stops generation; the white space that is all of the end is learnt."""
    tokenizer = chat_tokenizer(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")
    assert end_of_turn(tokenizer) is None
    ids, ((start, end),) = encode_conversation(tokenizer, CONVERSATION[:2], 0, "a record")
    assert end == len(ids)
    assert tokenizer.decode(ids[start:end]) == "assistant: A row of items.\n\n"  # there is no generation prompt


def test_a_boundary_inside_a_token_is_kept(tmp_path: Path) -> None:
    """The tokenizer joins two line breaks; generation starts behind the first."""
    tokenizer = chat_tokenizer(tmp_path, "chatml")
    tokenizer.add_tokens(["\n\n"])
    turns = [USER, {"role": "assistant", "content": "\nA row."}, *CONVERSATION[2:]]
    ids, spans = encode_conversation(tokenizer, turns, 0, "a record")
    assert ids[: spans[0][0]] == encode_chat_prompt(tokenizer, turns[:1])
    assert ids[: spans[1][0]][-1:] == encode_chat_prompt(tokenizer, turns[:3])[-1:]
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == ["\nA row.<|im_end|>", "A bag.<|im_end|>"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_what_the_template_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "strict")
    for turns, message in (
        ([SYSTEM, *CONVERSATION], "the turns system/user/assistant/user/assistant .*System role not supported"),
        ([USER, USER, ANSWER], "the turns user/user/assistant .*Conversation roles must alternate"),
    ):
        with pytest.raises(ValueError, match=rf"data\.jsonl, line 3: the chat template of .* refuses {message}"):
            encode_conversation(tokenizer, turns, 0, "data.jsonl, line 3")


def test_without_a_chat_template_the_remedies_are_named(tmp_path: Path) -> None:
    tokenizer = fast_tokenizer(tmp_path)
    record: Any = {"instruction": "Say it.", "input": "", "output": "It."}
    for encode in (
        lambda: tokenize(tokenizer, [record], CHAT),
        lambda: encode_questions(tokenizer, [("Say it.", "")], "chat"),
        lambda: end_of_turn(tokenizer),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path}.* has no chat template: give --tokenizer.*--prompt_template"):
            encode()


def test_a_template_that_looks_ahead_needs_marks_or_one_record_per_answer(tmp_path: Path) -> None:
    turns = [dict(turn) for turn in CONVERSATION]
    turns[1]["content"] = "<think>Lists...</think> A row."
    tokenizer = chat_tokenizer(tmp_path, LOOKING_AHEAD)
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3, turn 2: .* otherwise when more turns follow.*\"prompt"):
        encode_conversation(tokenizer, turns, 0, "data.jsonl, line 3")
    assert _answers(tokenizer, turns, given=3) == ["A bag.<|im_end|>"]
    assert _answers(tokenizer, turns[:2]) == ["<think>Lists...</think> A row.<|im_end|>"]
    tokenizer.chat_template = LOOKING_AHEAD_MARKED
    assert _answers(tokenizer, turns) == ["A row.<|im_end|>", "A bag.<|im_end|>"]
    assert _answers(tokenizer, turns, given=3) == ["A bag.<|im_end|>"]


def test_an_answer_that_does_not_follow_the_generation_prompt_needs_marks(tmp_path: Path) -> None:
    """As where the prompt opens the reasoning, and the template leaves it out of every turn."""
    opened = TEMPLATES["chatml"].replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    assert opened != TEMPLATES["chatml"]
    tokenizer = chat_tokenizer(tmp_path, opened)
    message = r"line 3, turn 2: .* ends its generation prompt in .*<think>', and does not write the answer behind"
    with pytest.raises(ValueError, match=message):
        encode_conversation(tokenizer, CONVERSATION, 0, "data.jsonl, line 3")
    tokenizer.chat_template = TEMPLATES["marked"].replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    assert _answers(tokenizer, CONVERSATION) == ["A row of items.<|im_end|>", "A bag.<|im_end|>"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
            r"one of them holds is '<\|im_end\|>'",
        ),
        (("assistant\n{% generation %}", "{% generation %}assistant\n"), "one of them holds is '[as]+"),
        (("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"), "marks 4 texts .* has 2 answers"),
    ],
)
def test_marks_that_are_not_the_answers_are_refused(wrong: tuple[str, str], message: str, tmp_path: Path) -> None:
    template = TEMPLATES["marked"].replace(*wrong)
    assert template != TEMPLATES["marked"]
    tokenizer = chat_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match=rf"line 3.*{message}"):
        encode_conversation(tokenizer, CONVERSATION, 0, "data.jsonl, line 3")


def test_a_template_that_writes_no_end_is_refused(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"line 3, turn 4: .* writes no end behind an answer"):
        encode_conversation(tokenizer, CONVERSATION, 2, "data.jsonl, line 3")


def test_tokens_of_another_chat_template_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    record = Record(instruction="Say it.", input="", output="It.")
    examples = []
    for template in ("chatml", "headers"):
        tokenizer = chat_tokenizer(tmp_path / "tokenizer", "chatml")
        tokenizer.chat_template = TEMPLATES[template]
        examples.append(list(cached_examples(tokenizer, [record], CHAT, tmp_path / "cache", build=True)))
        assert examples[-1] == tokenize(tokenizer, [record], CHAT)
    assert examples[0] != examples[1]
