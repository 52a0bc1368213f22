"""Conversations as a tokenizer's chat template writes them, and which of their tokens are answers.

The template writes the turns before an answer, with its generation prompt, and the turns up to the answer. Between the
ends of these two texts lies the answer with its end of turn. Both texts must be beginnings of the whole conversation's
text. If the template marks answers itself (``{% generation %}``), its marks must agree, and serve alone where the
beginnings differ.

Nothing is added to the template's text: most templates write the start token themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

Turn = dict[str, str]  # role and content
Span = tuple[int, int]  # (start, end) of an answer, in characters or tokens
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def question_turn(instruction: str, further_input: str = "") -> Turn:
    """Return the user's turn for an instruction and its input."""
    return {"role": "user", "content": f"{instruction}\n\n{further_input}" if further_input else instruction}


def require_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: it has none; the message names the remedies.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: give --tokenizer, the one of a chat "
            "model of the same family, or --prompt_template plain or alpaca, which write one question and its answer"
        )


def encode_chat_prompt(tokenizer: Any, turns: Sequence[Turn], place: str = "the question") -> list[int]:
    """Return the token ids that generation continues: the turns, then the template's generation prompt.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses the turns.
    """
    require_chat_template(tokenizer)
    return _ids(tokenizer, _render(tokenizer, turns, place, answer_next=True))


def encode_conversation(tokenizer: Any, turns: Sequence[Turn], given: int, place: str) -> tuple[list[int], list[Span]]:
    """Return the token ids of a conversation, and where its answers lie among them, each with its end of turn.

    White space that the template writes behind an end of turn is not part of the answer: it is never generated.

    Args:
        tokenizer: the tokenizer with its chat template.
        turns: the turns; the first is not the assistant's.
        given: number of turns at the beginning that are not answers, whoever speaks.
        place: where the conversation was read, for error messages.

    Raises:
        ValueError: the template refuses the turns, or its text does not show which tokens are answers.
    """
    require_chat_template(tokenizer)
    text = _render(tokenizer, turns, place)
    spans = _answers(tokenizer, turns, given, text, place)
    ids, positions = _encode_at(tokenizer, text, [cut for span in spans for cut in span])
    return ids, list(zip(positions[::2], positions[1::2], strict=True))


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token with which the chat template ends an answer; None if ordinary text ends it.

    Raises:
        ValueError: see :func:`encode_conversation`.
    """
    turns = [question_turn("1"), {"role": "assistant", "content": "2"}]
    ids, spans = encode_conversation(tokenizer, turns, 0, "a question and an answer")
    last = ids[spans[0][1] - 1]
    return last if last in tokenizer.get_added_vocab().values() else None


def _render(tokenizer: Any, turns: Sequence[Turn], place: str, *, answer_next: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=answer_next)
    except Exception as error:  # templates are programs, and raise errors of any type
        from reflora_dist.files.open_files import cause_of  # imports torch, and options import this module

        raise ValueError(
            f"{place}: the chat template of {tokenizer.name_or_path!r} refuses the turns "
            f"{'/'.join(turn['role'] for turn in turns)} ({cause_of(error)}); correct or remove the record"
        ) from error


def _answers(tokenizer: Any, turns: Sequence[Turn], given: int, text: str, place: str) -> list[Span]:
    """Return the span of every answer in the text of the whole conversation."""
    marks = _marks(tokenizer, turns, place)
    spans = []
    for index, turn in enumerate(turns):
        mark = next(marks, None) if turn["role"] == "assistant" else None
        if turn["role"] != "assistant" or index < given:
            continue
        own_place = f"{place}, turn {index + 1}"
        before = _render(tokenizer, turns[:index], own_place, answer_next=True)
        through = _render(tokenizer, turns[: index + 1], own_place)
        if text.startswith(through) and through.startswith(before):
            span = (len(before), len(through))
            if mark is not None:
                _require_agreement(tokenizer, text, span, mark, own_place)
        elif mark is not None:
            span = mark
        else:
            _refuse_hidden_answer(tokenizer, before, through, own_place)
        spans.append(_without_white_space(text, span, turn["content"], own_place))
    return spans


def _refuse_hidden_answer(tokenizer: Any, before: str, through: str, place: str) -> NoReturn:
    template = f"the chat template of {tokenizer.name_or_path!r}"
    remedy = "give a --tokenizer whose template marks answers with {% generation %}"
    if not through.startswith(before):
        raise ValueError(
            f"{place}: {template} ends its generation prompt in {before[-20:]!r}, and does not write the answer behind "
            f"that, so its tokens are not known: {remedy}"
        )
    raise ValueError(
        f"{place}: {template} writes the turns up to this answer otherwise when more turns follow: make a record of "
        f'each answer, {{"prompt": [the turns before], "completion": [the answer]}}, or {remedy}'
    )


def _marks(tokenizer: Any, turns: Sequence[Turn], place: str) -> Any:
    """Return an iterator over the template's own marks, one for each turn of the assistant; empty without marks."""
    template = tokenizer.get_chat_template()
    if not _MARK.search(template):
        return iter(())
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[list(turns)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    marks = rendered[1][0]  # of the first conversation
    answers = sum(turn["role"] == "assistant" for turn in turns)
    if len(marks) != answers:
        raise ValueError(
            f"{place}: the chat template of {tokenizer.name_or_path!r} marks {len(marks)} texts with "
            f"{{% generation %}}, and the conversation has {answers} answers: correct the template"
        )
    return iter(marks)


def _require_agreement(tokenizer: Any, text: str, span: Span, mark: Span, place: str) -> None:
    """Refuse a mark that is not the span. White space at both ends does not count."""
    (start, end), (mark_start, mark_end) = (_stripped(text, part) for part in (span, mark))
    if (start, end) == (mark_start, mark_end):
        return
    one, other = (start, mark_start) if start != mark_start else (end, mark_end)
    first = tokenizer.tokenize(text[min(one, other) : max(one, other)].lstrip())[0]
    raise ValueError(
        f"{place}: the {{% generation %}} mark of the chat template of {tokenizer.name_or_path!r} is not the text that "
        f"the template writes for this answer; the first token that only one of them holds is {first!r}: correct the "
        "template, so that it marks the answer and its end of turn, or remove its marks"
    )


def _stripped(text: str, span: Span) -> Span:
    start, end = span
    content = text[start:end]
    return end - len(content.lstrip()), start + len(content.rstrip())


def _without_white_space(text: str, span: Span, content: str, place: str) -> Span:
    """Return the span without the white space behind the end of turn.

    Raises:
        ValueError: the template writes nothing behind the answer.
    """
    start, end = span
    answer = text[start:end]
    written = content if content in answer else content.strip()
    behind = answer.partition(written)[2] if written in answer else answer  # templates may leave out reasoning
    if not behind:
        raise ValueError(
            f"{place}: the chat template writes no end behind an answer, or does not mark it, so a model cannot learn "
            "where to stop: correct the template"
        )
    return (start, start + len(answer.rstrip())) if behind.strip() else span


def _encode_at(tokenizer: Any, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the text's token ids, and the number of tokens before each cut.

    Where the tokenizer would join the two sides of a cut in one token, they are encoded apart, as in generation.
    """
    ids: list[int] = []
    start, positions = 0, []
    rest = _ids(tokenizer, text)  # of text[start:]
    for cut in cuts:
        before = _ids(tokenizer, text[start:cut])
        positions.append(len(ids) + len(before))
        if rest[: len(before)] != before:
            ids, start = ids + before, cut
            rest = _ids(tokenizer, text[start:])
    return ids + rest, positions


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
