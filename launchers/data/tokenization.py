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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import build_once
from .records import Record

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2  # part of the cache key; raise it when prompts, masking or packing change
IGNORE_INDEX = -100  # the label that the loss ignores
# (without further input, with it). Each ends with a line break, so that no tokenizer merges across it.
PROMPT_TEMPLATES = {
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
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizationSettings:
    """How records become training examples.

    Attributes:
        max_length: tokens kept of prompt and answer together.
        train_on_prompt: whether the loss includes the prompt's tokens.
        packing: whether a row of ``max_length`` tokens holds several short examples. Models that separate them by
            their positions train as without packing; see ``launchers.training.batching``.
        prompt_template: a name of :data:`PROMPT_TEMPLATES`.
    """

    max_length: int = 512
    train_on_prompt: bool = False
    packing: bool = False
    prompt_template: str = "plain"


def format_prompt(instruction: str, further_input: str = "", template: str = "plain") -> str:
    """Return the text before the answer, in training and in generation."""
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


def _length_without(ids: list[int], ends: set[int]) -> int:
    """Return the number of tokens before those that the tokenizer adds at the end of a text."""
    length = len(ids)
    while length > 1 and ids[length - 1] in ends:
        length -= 1
    return length


def tokenize(tokenizer: Any, records: Sequence[Record], settings: TokenizationSettings) -> list[dict[str, list[int]]]:
    """Encode every record as ``input_ids`` and ``labels``. Records whose prompt fills max_length are dropped.

    An answer cut at ``max_length`` gets no end token, so the model does not learn to stop there.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token, an answer has no token, or every record is dropped.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token; choose another")
    texts = [format_prompt(r["instruction"], r["input"], settings.prompt_template) for r in records]
    prompts = encode_prompts(tokenizer, texts)
    answers = tokenizer([r["output"] for r in records], add_special_tokens=False, verbose=False)["input_ids"]
    examples, dropped = [], []
    for record, prompt_ids, answer_ids in zip(records, prompts, answers, strict=True):
        place = getattr(record, "place", "a record")
        if not answer_ids:
            raise ValueError(
                f"{place}: field 'output' {record['output']!r:.60} has no token in the tokenizer of "
                f"{tokenizer.name_or_path!r}; remove the record, or choose another --tokenizer"
            )
        if len(prompt_ids) < settings.max_length:
            examples.append(_example(prompt_ids, [*answer_ids, tokenizer.eos_token_id], settings))
        else:
            dropped.append(place)
    if not examples:
        raise ValueError(
            f"max_length={settings.max_length} is too short: no answer token of any of the {len(records)} "
            f"records survives; the shortest prompt has {min(map(len, prompts))} tokens: raise it above that"
        )
    if dropped:
        logger.warning(
            "%d of %d records dropped: their prompt alone fills max_length=%d tokens; the first is %s",
            len(dropped),
            len(records),
            settings.max_length,
            dropped[0],
        )
    return pack(examples, settings.max_length) if settings.packing else examples


def _example(prompt: list[int], answer: list[int], settings: TokenizationSettings) -> dict[str, list[int]]:
    input_ids = (prompt + answer)[: settings.max_length]
    # Nothing before the first token can predict it. In a packed row the example before must not predict it.
    masked = 1 if settings.train_on_prompt else max(1, len(prompt))
    return {"input_ids": input_ids, "labels": [IGNORE_INDEX] * masked + input_ids[masked:]}


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
        attention_mask  [b, t]  1 on real tokens; only for rows that are not packed
        position_ids    [b, t]  only for packed rows; padding counts from 0 like a further example
    """

    pad_token_id: int
    multiple_of: int = 8

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
        tokenizer, records, key, lambda: tokenize(tokenizer, records, settings), cache_dir, build=build
    )


def cached_dataset(
    tokenizer: Any,
    records: Sequence[Any],
    key: dict[str, Any],
    encode: Callable[[], list[dict[str, Any]]],
    cache_dir: Path,
    *,
    build: bool,
) -> Any:
    """Return encoded records as a memory-mapped ``datasets.Dataset``, made once and kept in ``cache_dir``.

    Args:
        tokenizer: the tokenizer that encodes them.
        records: the records, JSON-ready.
        key: everything else that the result depends on.
        encode: returns the rows.
        cache_dir: where they are kept.
        build: False on ranks that only use what another rank wrote.

    Raises:
        RuntimeError: the data is not there and ``build`` is False.
    """
    import datasets

    digest = hashlib.sha256(json.dumps(list(records)).encode()).hexdigest()
    key = {"tokenizer": _fingerprint(tokenizer), "records": digest, **key}

    def write(folder: Path) -> None:
        datasets.Dataset.from_list(encode()).save_to_disk(str(folder / "examples"))

    folder = build_once(cache_dir, "tokens", key, write, build=build)
    return datasets.load_from_disk(str(folder / "examples"))


def _fingerprint(tokenizer: Any) -> str:
    """Return a digest of what the ids depend on: vocabulary, special tokens, and the tokens of a probe text."""
    probe = tokenizer("Cut this:\n    é = f(x, 12)  # 漢字")["input_ids"]
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        probe,
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
