"""Turn instruction records into token ids, labels and batches, with SentencePiece and fast tokenizers alike.

Prompt and answer are encoded separately and joined. So the boundary between them is exact with every tokenizer, and
generation continues from the same tokens as training.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflora_dist.files.cache import build_once

from .records import Record

if TYPE_CHECKING:
    from torch import Tensor

from .conversations import Turn, encode_chat_prompt, encode_conversation, question_turn
from .forms import conversation_of, is_text

FORMAT_VERSION = 2  # part of the cache key; raise it when prompts, masking or packing change
IGNORE_INDEX = -100  # the label that the loss ignores
# (without further input, with it). All but the first end with a line break, so that no tokenizer merges across it.
PROMPT_TEMPLATES = {
    "none": ("{instruction}", "{instruction}\n{input}"),
    "plain": ("Task: {instruction}\nAnswer:\n", "Task: {instruction}\nGiven: {input}\nAnswer:\n"),
    # Stanford Alpaca's template, with which LLM-Adapters, DoRA and RefLoRA train and evaluate. Their files indent its
    # lines by 16 spaces, differently in training and evaluation. Here, as in Alpaca, lines are not indented.
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
}
CHAT = "chat"  # the tokenizer's chat template, with the instruction and its input as the user's turn
TEMPLATE_NAMES = (*PROMPT_TEMPLATES, CHAT)
Encoded = tuple[list[int], list[tuple[int, int]]]  # token ids, and (start, end) of each answer among them
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizationSettings:
    """How records become training examples.

    Attributes:
        max_length: tokens kept of prompt and answer together.
        train_on_prompt: whether the loss includes the prompt's tokens.
        packing: whether a row of ``max_length`` tokens holds several short examples. Models that separate them by
            their positions train as without packing; see ``launchers.training.batching``.
        prompt_template: one of :data:`TEMPLATE_NAMES`; None leaves the choice to :func:`choose_template`.
    """

    max_length: int = 512
    train_on_prompt: bool = False
    packing: bool = False
    prompt_template: str | None = None


def format_prompt(instruction: str, further_input: str = "", template: str = "plain") -> str:
    """Return the text before the answer, in training and in generation. ``template`` is one of PROMPT_TEMPLATES."""
    without_input, with_input = PROMPT_TEMPLATES[template]
    return (with_input if further_input else without_input).format(instruction=instruction, input=further_input)


def padding_token(tokenizer: Any) -> int:
    """Return the token id that pads rows. Padding is masked, so any token of the vocabulary serves."""
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in given if token is not None), 0)


def encode_prompts(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Return token ids of prompts to continue: with the tokenizer's start token, without its end tokens."""
    encoded = tokenizer(prompts, verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id} - {None}
    return [ids[: _length_without(ids, ends)] for ids in encoded]


def encode_questions(tokenizer: Any, questions: Sequence[tuple[str, str]], template: str) -> list[list[int]]:
    """Return the token ids that generation continues, of each instruction and its further input.

    Raises:
        ValueError: the template is the tokenizer's, and it has none or refuses a question.
    """
    if template == CHAT:
        return [encode_chat_prompt(tokenizer, [question_turn(*question)]) for question in questions]
    return encode_prompts(tokenizer, [format_prompt(*question, template) for question in questions])


def encode_last_question(tokenizer: Any, record: Record, template: str) -> list[int]:
    """Return the token ids before the last answer of a record, as in training.

    Raises:
        ValueError: the record does not go with the template, or the tokenizer has no chat template or it refuses.
    """
    turns = _turns(record, template)
    if turns is None:
        return encode_prompts(tokenizer, [_question_and_answer(record, template)[0]])[0]
    last = max(index for index, turn in enumerate(turns[0]) if turn["role"] == "assistant")
    return encode_chat_prompt(tokenizer, turns[0][:last], _place(record))


def _length_without(ids: list[int], ends: set[int]) -> int:
    """Return the number of tokens before those that the tokenizer adds at the end of a text."""
    length = len(ids)
    while length > 1 and ids[length - 1] in ends:
        length -= 1
    return length


def choose_template(given: str | None, records: Sequence[Record]) -> str:
    """Return the prompt template of a run.

    Args:
        given: the user's choice, or None. Then it is the tokenizer's chat template if a record is a conversation,
            "none" if all are prompts with completions, and "plain" otherwise.
        records: all records of the run.

    Raises:
        ValueError: a template is given, and every record is a prompt with a completion.
    """
    texts = all(map(is_text, records))
    if given is None:
        chat = any(conversation_of(record) is not None for record in records)
        return CHAT if chat else "none" if texts else "plain"
    if texts and given != "none":
        raise ValueError(
            f'prompt_template={given!r} means nothing to {{"prompt": ..., "completion": ...}}, texts that are taken as '
            "they are: drop it"
        )
    return given


def tokenize(
    tokenizer: Any,
    records: Sequence[Record],
    settings: TokenizationSettings,
    told: Callable[[str], Any] = logger.warning,
) -> list[dict[str, list[int]]]:
    """Encode every record as ``input_ids`` and ``labels``. Records whose prompt fills max_length are dropped.

    ``told`` gets their number. An answer cut at ``max_length`` gets no end token, so the model does not learn to stop
    there.

    Raises:
        ValueError: the tokenizer lacks what the template needs, an answer has no token, or every record is dropped.
    """
    examples, dropped, prompt_lengths = [], [], []
    template = choose_template(settings.prompt_template, records)
    for record, (ids, answers) in zip(records, _encoded(tokenizer, records, template), strict=True):
        prompt_lengths.append(answers[0][0])
        if prompt_lengths[-1] < settings.max_length:
            examples.append(_example(ids, answers, settings))
        else:
            dropped.append(_place(record))
    if not examples:
        raise ValueError(
            f"max_length={settings.max_length} is too short: no answer token of any of the {len(records)} "
            f"records survives; the shortest prompt has {min(prompt_lengths)} tokens: raise it above that"
        )
    if dropped:
        told(
            f"{len(dropped)} of {len(records)} records dropped: their prompt alone fills "
            f"max_length={settings.max_length} tokens; the first is {dropped[0]}"
        )
    return pack(examples, settings.max_length) if settings.packing else examples


def _encoded(tokenizer: Any, records: Sequence[Record], template: str) -> Iterable[Encoded]:
    """Yield every record's token ids and the positions of its answers."""
    by_turns = [_turns(record, template) for record in records]
    texts = _encoded_texts(
        tokenizer, [r for r, turns in zip(records, by_turns, strict=True) if turns is None], template
    )
    for record, turns in zip(records, by_turns, strict=True):
        yield next(texts) if turns is None else encode_conversation(tokenizer, *turns, _place(record))


def _turns(record: Record, template: str) -> tuple[list[Turn], int] | None:
    """Return the turns of a record and how many are given; None if the chat template does not write the record."""
    if template != CHAT or is_text(record):
        return None
    conversation = conversation_of(record)
    if conversation is None:
        asked = question_turn(record["instruction"], record["input"])
        return [asked, {"role": "assistant", "content": record["output"]}], 0
    return conversation


def _question_and_answer(record: Record, template: str) -> tuple[str, str]:
    """Return the texts before and of the answer of a record that the chat template does not write.

    Raises:
        ValueError: the record is a conversation of more than a question and an answer.
    """
    if is_text(record):
        return record["prompt"], record["completion"]
    conversation = conversation_of(record)
    if conversation is None:
        return format_prompt(record["instruction"], record["input"], template), record["output"]
    turns, _ = conversation
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"]:
        raise ValueError(
            f"{_place(record)}: prompt_template={template!r} writes one question and its answer, and the turns are "
            f"{'/'.join(roles)}; give --prompt_template chat, or remove the record"
        )
    return format_prompt(turns[0]["content"], "", template), turns[1]["content"]


def _encoded_texts(tokenizer: Any, records: Sequence[Record], template: str) -> Iterator[Encoded]:
    if not records:
        return
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token; choose another")
    pairs = [_question_and_answer(record, template) for record in records]
    prompts = encode_prompts(tokenizer, [question for question, _ in pairs])
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    wholes = encode_prompts(tokenizer, ["".join(pair) for pair in pairs]) if any(map(is_text, records)) else prompts
    for record, prompt, answer, whole in zip(records, prompts, answers, wholes, strict=True):
        if is_text(record) and whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]  # a SentencePiece tokenizer would put a space before an answer apart
        if not answer:
            field = "completion" if is_text(record) else "output" if "output" in record else "content"
            raise ValueError(
                f"{_place(record)}: field {field!r} {_question_and_answer(record, template)[1]!r:.60} has no token in "
                f"the tokenizer of {tokenizer.name_or_path!r}; remove the record, or choose another --tokenizer"
            )
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        yield ids, [(len(prompt), len(ids))]


def _place(record: Record) -> str:
    return getattr(record, "place", "a record")


def _example(ids: list[int], answers: list[tuple[int, int]], settings: TokenizationSettings) -> dict[str, list[int]]:
    input_ids = ids[: settings.max_length]
    labels = [IGNORE_INDEX] * len(input_ids)
    for start, end in [(0, len(ids))] if settings.train_on_prompt else answers:
        labels[start:end] = input_ids[start:end]
    # Nothing before the first token can predict it. In a packed row the example before must not predict it.
    labels[0] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


def pack(examples: list[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """Fill rows of at most ``max_length`` tokens: longest examples first, each into the fullest row with room.

    ``position_ids`` start again at 0 with every example. Without an attention mask and a cache, transformers builds a
    block-diagonal causal mask from that for many models. Then the loss is the same as without packing.
    """
    rows: list[dict[str, list[int]]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example in sorted(examples, key=lambda e: len(e["input_ids"]), reverse=True):
        length = len(example["input_ids"])
        slot = bisect.bisect_left(room, (length, -1))
        if slot == len(room):
            rows.append({"input_ids": [], "labels": [], "position_ids": []})
            free, row = max_length, len(rows) - 1
        else:
            free, row = room.pop(slot)
        rows[row]["input_ids"] += example["input_ids"]
        rows[row]["labels"] += example["labels"]
        rows[row]["position_ids"] += range(length)
        if free > length:
            bisect.insort(room, (free - length, row))
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collator:
    """Pad the rows of a batch on the right to a common length, a multiple of ``multiple_of`` tokens.

    Returns, for a batch of b rows padded to t tokens:
        input_ids       [b, t]  padded with ``pad_token_id``
        labels          [b, t]  padded with -100
        attention_mask  [b, t]  1 on real tokens, where there are no positions
        position_ids    [b, t]  for packed rows, whose padding counts from 0 like a further example; with ``positions``
                                for all rows. Padding is on the right, where a causal mask hides it
    """

    pad_token_id: int
    multiple_of: int = 8
    positions: bool = False  # for ranks that share a sequence, and do not know where their part begins

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        import torch  # not above: options are named from this module before torch is there

        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        missing = [length - len(row["input_ids"]) for row in rows]

        def padded(name: str, padding: Any) -> Tensor:
            return torch.tensor([[*row[name], *padding(n)] for row, n in zip(rows, missing, strict=True)])

        batch = {
            "input_ids": padded("input_ids", lambda n: [self.pad_token_id] * n),
            "labels": padded("labels", lambda n: [IGNORE_INDEX] * n),
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = padded("position_ids", range)
        elif self.positions:
            batch["position_ids"] = torch.arange(length).repeat(len(rows), 1)
        else:
            batch["attention_mask"] = torch.tensor([[1] * (length - n) + [0] * n for n in missing])
        return batch


def cached_examples(
    tokenizer: Any, records: Sequence[Record], settings: TokenizationSettings, cache_dir: Path, *, build: bool
) -> Any:
    """Return the tokenized records, as :func:`cached_dataset` keeps them.

    Raises:
        ValueError: see :func:`tokenize`.
        RuntimeError: the data is not there and ``build`` is False.
    """
    key = {"format": FORMAT_VERSION, **dataclasses.asdict(settings)}
    return cached_dataset(
        tokenizer, records, key, lambda told: tokenize(tokenizer, records, settings, told), cache_dir, build=build
    )


def cached_dataset(
    tokenizer: Any,
    records: Sequence[Any],
    key: dict[str, Any],
    encode: Callable[[Callable[[str], Any]], list[dict[str, Any]]],
    cache_dir: Path,
    *,
    build: bool,
) -> Any:
    """Return encoded records as a memory-mapped ``datasets.Dataset``, made once and kept in ``cache_dir``.

    Args:
        tokenizer: the tokenizer that encodes them.
        records: the records, JSON-ready.
        key: everything else that the result depends on.
        encode: returns the rows; it gets a function that takes what the user should be told of them.
        cache_dir: where they are kept.
        build: False on ranks that only use what another rank wrote.

    Raises:
        ValueError: the data cannot be read.
        RuntimeError: the data is not there and ``build`` is False.
    """
    import datasets

    from reflora_dist.files.open_files import cause_of  # which imports torch; --help does not need it

    digest = hashlib.sha256(json.dumps(list(records)).encode()).hexdigest()
    key = {"tokenizer": _fingerprint(tokenizer), "records": digest, **key}

    def write(folder: Path) -> None:
        notes: list[str] = []
        rows = encode(notes.append)
        info = datasets.DatasetInfo(description="\n".join(notes))  # every run tells it, also one that encodes nothing
        datasets.Dataset.from_list(rows, info=info).save_to_disk(str(folder / "examples"))

    folder = build_once(cache_dir, "tokens", key, write, build=build)
    try:
        examples = datasets.load_from_disk(str(folder / "examples"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the encoded records in {folder} cannot be read ({cause_of(error)}): remove it") from error
    if build and examples.info.description:
        logger.warning("%s", examples.info.description)
    return examples


def _fingerprint(tokenizer: Any) -> str:
    """Return a digest of what the ids depend on: vocabulary, special tokens, chat template, tokens of a probe text."""
    probe = tokenizer("Cut this:\n    é = f(x, 12)  # 漢字")["input_ids"]
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        getattr(tokenizer, "chat_template", None),
        probe,
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
