"""From records to labels: what is learnt, what is cut, and that packing changes nothing but the padding."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM

from launchers.data.records import Record
from launchers.data.tokenization import (
    IGNORE_INDEX,
    Collator,
    TokenizationSettings,
    cached_examples,
    encode_prompts,
    format_prompt,
    pack,
    tokenize,
)
from tests.support.launchers import TOKENIZERS, micro_model

RECORDS: Any = [
    {"instruction": "What does add do?", "input": "add(a, b)", "output": "Return the sum of a and b."},
    {"instruction": "Say it.", "input": "", "output": "It, in two lines:\n    done"},
]


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return TOKENIZERS[request.param](tmp_path / request.param)


def test_only_the_answer_and_its_end_are_learnt(tokenizer: Any) -> None:
    for record, example in zip(RECORDS, tokenize(tokenizer, RECORDS, TokenizationSettings()), strict=True):
        learnt = [label for label in example["labels"] if label != IGNORE_INDEX]
        assert learnt[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learnt[:-1]).strip() == record["output"]
        prompt_length = len(example["labels"]) - len(learnt)
        assert example["labels"][:prompt_length] == [IGNORE_INDEX] * prompt_length
        # what generation is given is exactly what stood before the answer in training
        prompt = format_prompt(record["instruction"], record["input"])
        assert encode_prompts(tokenizer, [prompt]) == [example["input_ids"][:prompt_length]]
        assert record["instruction"] in tokenizer.decode(example["input_ids"][:prompt_length])


def test_the_prompt_is_learnt_on_request(tokenizer: Any) -> None:
    for example in tokenize(tokenizer, RECORDS, TokenizationSettings(train_on_prompt=True)):
        assert example["labels"] == [IGNORE_INDEX, *example["input_ids"][1:]]


def test_an_end_token_that_the_tokenizer_adds_is_not_part_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["sentencepiece"](tmp_path)
    plain = encode_prompts(tokenizer, ["Say it."])
    tokenizer.add_eos_token = True
    if hasattr(tokenizer, "update_post_processor"):
        tokenizer.update_post_processor()
    assert tokenizer("Say it.")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_prompts(tokenizer, ["Say it."]) == plain


def test_a_long_answer_is_cut_and_a_long_prompt_is_dropped(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompts = encode_prompts(tokenizer, [format_prompt(r["instruction"], r["input"]) for r in RECORDS])
    short, long = sorted(len(p) for p in prompts)
    assert short < long
    with caplog.at_level(logging.WARNING):
        examples = tokenize(tokenizer, RECORDS, TokenizationSettings(max_length=short + 1))
    assert "1 of 2 records dropped" in caplog.text and "the first is a record" in caplog.text
    (example,) = examples
    assert len(example["input_ids"]) == short + 1
    assert example["labels"][-1] == example["input_ids"][-1] != tokenizer.eos_token_id
    with pytest.raises(ValueError, match=f"max_length={short} is too short.*shortest prompt has {short} tokens"):
        tokenize(tokenizer, RECORDS, TokenizationSettings(max_length=short))


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        tokenize(tokenizer, RECORDS, TokenizationSettings())


def test_an_answer_without_a_token_is_named(tmp_path: Path) -> None:
    """The tokenizer drops what stands for nothing: the model would learn to say nothing."""
    tokenizer = TOKENIZERS["fast"](tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    record = Record(instruction="Say it.", input="", output="\u200b")
    record.place = "records.jsonl, line 7"
    with pytest.raises(
        ValueError, match=r"records.jsonl, line 7: field 'output' '\\u200b' has no token in the tokenizer"
    ):
        tokenize(tokenizer, [*RECORDS, record], TokenizationSettings())


def test_every_token_that_the_tokenizer_adds_behind_a_text_is_left_out(tmp_path: Path) -> None:
    """As XLNet's <sep> <cls>, so that generation and training go on from the text itself."""
    tokenizer = TOKENIZERS["fast"](tmp_path)
    plain = encode_prompts(tokenizer, ["Say it."])
    tokenizer.add_special_tokens({"sep_token": "<sep>", "cls_token": "<cls>"})
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<sep>", "<cls>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <sep> <cls>", special_tokens=added
    )
    assert tokenizer("Say it.")["input_ids"] == [*plain[0], *(number for _, number in added)]
    assert encode_prompts(tokenizer, ["Say it."]) == plain


def test_packing_keeps_every_example_whole_and_fills_rows() -> None:
    examples = [{"input_ids": [n] * n, "labels": [-100] + [n] * (n - 1)} for n in (7, 3, 5, 2, 2, 1)]
    rows = pack(examples, max_length=10)
    assert len(rows) == 2  # 20 tokens in all
    seen = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == 10
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], 10], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == IGNORE_INDEX  # never predicted from the example before
            seen.append({name: row[name][start:end] for name in ("input_ids", "labels")})
    key = lambda example: (len(example["input_ids"]), example["input_ids"])  # noqa: E731
    assert sorted(seen, key=key) == sorted(examples, key=key)


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_packed_rows_have_the_loss_of_the_examples_one_by_one(tmp_path: Path, train_on_prompt: bool) -> None:
    """Rows of several examples and padding give each token the loss it has alone: no example sees another."""
    folder = micro_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = TOKENIZERS["sentencepiece"](folder)
    collate = Collator(pad_token_id=tokenizer.eos_token_id)
    records = RECORDS * 2 + RECORDS[:1]

    def total_loss(rows: list[dict[str, list[int]]]) -> torch.Tensor:
        batch = collate(rows)
        learnt = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        return model(**batch, use_cache=False).loss * learnt

    kwargs = {"max_length": 160, "train_on_prompt": train_on_prompt}
    single = tokenize(tokenizer, records, TokenizationSettings(**kwargs))
    packed = tokenize(tokenizer, records, TokenizationSettings(**kwargs, packing=True))
    assert len(packed) < len(single)
    with torch.no_grad():
        expected = sum(total_loss([example]) for example in single)
        # fp32 sums of about 200 token losses in another order
        torch.testing.assert_close(total_loss(packed), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(total_loss(single), expected, rtol=1e-5, atol=0)


def test_the_collator_pads_to_a_multiple_and_masks_the_padding() -> None:
    batch = Collator(pad_token_id=9)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [4, 9, 9, 9, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3] + [-100] * 5, [4] + [-100] * 7]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    for_cut_rows = Collator(pad_token_id=9, positions=True)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    assert for_cut_rows["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert "attention_mask" not in for_cut_rows
    packed = Collator(pad_token_id=9)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 1, 0]}])
    assert packed["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2, 3, 4]]
    assert "attention_mask" not in packed


def test_tokenized_data_is_written_once_and_found_by_the_others(tokenizer: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settings = TokenizationSettings(max_length=100)
    with pytest.raises(RuntimeError, match="is missing"):
        cached_examples(tokenizer, RECORDS, settings, cache, build=False)
    built = cached_examples(tokenizer, RECORDS, settings, cache, build=True)
    found = cached_examples(tokenizer, RECORDS, settings, cache, build=False)
    assert list(built) == list(found) == tokenize(tokenizer, RECORDS, settings)
    changed = TokenizationSettings(max_length=100, train_on_prompt=True)
    with pytest.raises(RuntimeError, match="is missing"):
        cached_examples(tokenizer, RECORDS, changed, cache, build=False)
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]  # nothing unfinished stays behind


def test_dropped_records_are_told_by_every_run(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = encode_prompts(tokenizer, [format_prompt(r["instruction"], r["input"]) for r in RECORDS])
    settings = TokenizationSettings(max_length=min(len(p) for p in prompts) + 1)
    for _ in range(2):
        cached_examples(tokenizer, RECORDS, settings, tmp_path, build=True)
        assert caplog.text.count("1 of 2 records dropped") == 1
        caplog.clear()
    cached_examples(tokenizer, RECORDS, settings, tmp_path, build=False)  # another rank of the machine
    assert "dropped" not in caplog.text


def test_encoded_records_from_which_files_are_gone_are_named(tokenizer: Any, tmp_path: Path) -> None:
    cached_examples(tokenizer, RECORDS, TokenizationSettings(), tmp_path, build=True)
    (folder,) = tmp_path.glob("tokens-*")
    for path in (folder / "examples").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"encoded records in {folder} cannot be read .*: remove it"):
        cached_examples(tokenizer, RECORDS, TokenizationSettings(), tmp_path, build=True)
