"""Tokens, positions and layer names are held to the loaded model before the first step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    RobertaConfig,
    RobertaModel,
)

from launchers import evaluate, finetune
from launchers.data.limits import Limits, check_examples
from launchers.data.tokenization import Collator
from launchers.training.targets import adapter_targets
from tests.support.architectures import saved_architecture, small_architecture
from tests.support.finetune import finetune_options
from tests.support.launchers import fast_tokenizer, write_records

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
# the option by which a configuration limits positions, and whether rows beyond end in an error
TABLES = {"gpt2": "n_positions", "gpt_neo": "max_position_embeddings", "opt": "max_position_embeddings"}
TABLES |= {"mpt": "max_seq_len"}
ROTARY = ("llama", "phi", "falcon", "mixtral")


def _data(*rows: list[int]) -> Dataset:
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_is_the_limit(name: str, tmp_path: Path) -> None:
    """Rows of so many tokens run, one more token is an error of the model and refused before."""
    model = small_architecture(name, **{TABLES[name]: 20})
    assert Limits.of(model) == Limits(tokens=360, positions=20, advised=None)
    model(input_ids=torch.arange(20)[None])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.arange(21)[None])
    tokenizer = fast_tokenizer(tmp_path)
    assert check_examples(model, tokenizer, {"dataset": _data(list(range(20)))}).positions == 20
    message = r"--eval_dataset: the longest row has 21 tokens and the model 20 positions; set --max_length 20 or lower"
    with pytest.raises(ValueError, match=message):
        check_examples(model, tokenizer, {"dataset": _data([1]), "eval_dataset": _data([1], list(range(21)))})


@pytest.mark.parametrize("name", ROTARY)
def test_longer_rows_than_rotary_models_were_made_for_are_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_architecture(name, max_position_embeddings=20)
    assert Limits.of(model) == Limits(tokens=360, positions=None, advised=20)
    model(input_ids=torch.arange(21)[None])
    tokenizer = fast_tokenizer(tmp_path)
    with caplog.at_level(logging.WARNING):
        check_examples(model, tokenizer, {"dataset": _data(list(range(20)))})
        assert not caplog.records
        check_examples(model, tokenizer, {"dataset": _data(list(range(21)))})
    assert "the longest example has 21 tokens, and max_position_embeddings of the model is 20" in caplog.text


def test_a_packed_row_is_as_long_as_its_longest_example(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_architecture("llama", max_position_embeddings=20)
    rows = [{"input_ids": [1] * 40, "labels": [1] * 40, "position_ids": [*range(20), *range(20)]}]
    with caplog.at_level(logging.WARNING):
        check_examples(model, fast_tokenizer(tmp_path), {"dataset": Dataset.from_list(rows)})
    assert not caplog.records


def test_encoders_have_the_positions_that_are_theirs() -> None:
    """RoBERTa's first rows stand for padding; DeBERTa-v3 has no table, and BERT's rows are all positions."""
    assert Limits.of(BertModel(BertConfig(**SMALL, max_position_embeddings=30))).positions == 30
    roberta = RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=32, pad_token_id=1)).eval()
    assert Limits.of(roberta).positions == 30
    roberta(input_ids=torch.full((1, 30), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 31), 5))
    deberta = DebertaV2Config(**SMALL, max_position_embeddings=30, position_biased_input=False, relative_attention=True)
    assert Limits.of(DebertaV2Model(deberta)) == Limits(tokens=50, positions=None, advised=30)


def test_padding_stays_within_the_positions() -> None:
    """A row of 18 tokens is padded to 24 for the sake of the hardware, but not if there are 20 positions."""
    row = {"input_ids": [1] * 18, "labels": [1] * 18}
    widths = {}
    for positions in (20, 24, None):
        multiple = Limits(tokens=360, positions=positions, advised=None).padded_multiple()
        widths[positions] = Collator(pad_token_id=0, multiple_of=multiple)([row])["input_ids"].shape[1]
    assert widths == {20: 18, 24: 24, None: 24}


def test_tokens_without_a_row_are_refused_with_both_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = fast_tokenizer(tmp_path)
    assert len(tokenizer) == 360
    model = small_architecture("llama", vocab_size=350)
    with caplog.at_level(logging.WARNING):
        check_examples(model, tokenizer, {"dataset": _data([349])})
    assert "has 360 tokens, the model's embedding 350 rows; no text here needs" in caplog.text
    message = (
        r"has 360 tokens, the model's embedding 350 rows: --dataset needs token 350 \('.+'\); give the --tokenizer"
    )
    with pytest.raises(ValueError, match=message):
        check_examples(model, tokenizer, {"dataset": _data([3], [350, 4])})


def test_special_tokens_are_held_to_the_embedding_too(tmp_path: Path) -> None:
    """Tokens for padding and for the end, added to the tokenizer and to the model not; no example holds them."""
    tokenizer = fast_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = small_architecture("llama")
    with pytest.raises(ValueError, match=r"361 tokens.* 360 rows: padding needs token 360 \('\[PAD\]'\)"):
        check_examples(model, tokenizer, {"dataset": _data([3])})
    tokenizer.add_special_tokens({"pad_token": "<end>", "eos_token": "<stop>"})
    with pytest.raises(ValueError, match=r"362 tokens.* 360 rows: the end of an answer needs token 361 \('<stop>'\)"):
        check_examples(model, tokenizer, {"dataset": _data([3])})
    model.resize_token_embeddings(362)
    check_examples(model, tokenizer, {"dataset": _data([3])})


def test_training_ends_before_its_first_step(tmp_path: Path) -> None:
    saved_architecture("gpt2", tmp_path / "model", vocab_size=100, n_positions=64)
    write_records(tmp_path / "records.jsonl")
    with pytest.raises(SystemExit, match=r"finetune.py: error: .*360 tokens, the model's embedding 100 rows"):
        finetune.main(finetune_options(tmp_path, "out"))
    saved_architecture("gpt2", tmp_path / "model", n_positions=20)
    with pytest.raises(
        SystemExit, match=r"finetune.py: error: --dataset: the longest row has \d\d tokens.* 20 positions"
    ):
        finetune.main(finetune_options(tmp_path, "out"))


def _evaluate(folder: Path, **changes: Any) -> None:
    question = {"instruction": "Is it so?", "answer": "true"}
    (folder / "test.json").write_text("[\n" + json.dumps(question) + "\n]")
    options = {"model": folder / "model", "tasks": f"boolq={folder / 'test.json'}", "max_new_tokens": 4}
    options |= {"prompt_template": "plain", "output_dir": folder / "out", "disable_tqdm": True, **changes}
    evaluate.main([part for name, value in options.items() for part in (f"--{name}", str(value))])


def test_an_evaluation_ends_before_its_first_answer(tmp_path: Path) -> None:
    """The question's place is named. The last generated token is not read, so 4 new ones need 3 positions.

    What was refused left no answers, so the same folder serves for the mended run.
    """
    saved_architecture("gpt2", tmp_path / "model", vocab_size=100)
    with pytest.raises(SystemExit, match=r"360 tokens, .* 100 rows: .*test.json, line 2 needs token"):
        _evaluate(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    length = len(tokenizer("Task: Is it so?\nAnswer:\n")["input_ids"])
    saved_architecture("gpt2", tmp_path / "model", n_positions=length + 2)
    message = rf"test.json, line 2: the prompt has {length} tokens and the answer 4, the model {length + 2} positions"
    with pytest.raises(SystemExit, match=message):
        _evaluate(tmp_path)
    saved_architecture("gpt2", tmp_path / "model", n_positions=length + 3)
    _evaluate(tmp_path)
    assert len((tmp_path / "out" / "answers.rank0.jsonl").read_text().splitlines()) == 1


def test_a_tokenizer_without_special_tokens_is_evaluated(tmp_path: Path) -> None:
    """Nothing ends an answer, and any token pads; the answers are those of one question at a time."""
    saved_architecture("llama", tmp_path / "model", std=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"instruction": text, "answer": "true"} for text in ("Is it so?", "Is it really so, or is it not?")]
    (tmp_path / "two.json").write_text(json.dumps(rows))
    outputs = []
    for size in (1, 2):
        folder = tmp_path / f"batch-{size}"
        _evaluate(tmp_path, tasks=f"boolq={tmp_path / 'two.json'}", batch_size=size, output_dir=folder)
        answers = map(json.loads, (folder / "answers.rank0.jsonl").read_text().splitlines())
        outputs.append({answer["index"]: answer["output"] for answer in answers})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 2


LINEAR = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "mamba": {"in_proj", "x_proj", "dt_proj"},  # PEFT refuses out_proj: fused kernels read its weight alone
    "falcon_h1": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"},
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_adapts_every_linear_layer_but_the_head(tmp_path: Path, name: str, tied: bool) -> None:
    saved_architecture(name, tmp_path / "model", tie_word_embeddings=tied)
    options = finetune.parse_options(finetune_options(tmp_path, "out"))
    model = finetune.add_adapter(small_architecture(name, tie_word_embeddings=tied), options)
    adapted = {path.rpartition(".")[2] for path, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert adapted == LINEAR[name]


def test_every_name_must_fit_a_layer() -> None:
    """The names of LLaMA's layers on models that join some of them, where PEFT would leave these without adapters."""
    assert adapter_targets(small_architecture("llama"), ["q_proj", "down_proj"])["target_modules"] == [
        "q_proj",
        "down_proj",
    ]
    message = r"Phi3ForCausalLM has no layer 'q_proj', 'up_proj'; give all-linear, or some of its linear layers: "
    with pytest.raises(ValueError, match=message + "down_proj, gate_up_proj, o_proj, qkv_proj$"):
        adapter_targets(small_architecture("phi3"), ["q_proj", "up_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no layer 'q_proj'.*: c_attn, c_fc, c_proj$"):
        adapter_targets(small_architecture("gpt2"), ["q_proj"])
    assert adapter_targets(small_architecture("gpt2"), ["attn.c_proj"])["target_modules"] == ["attn.c_proj"]
    with pytest.raises(ValueError, match="no layer 'proj'"):
        adapter_targets(small_architecture("gpt2"), ["proj"])


def test_methods_for_plain_linear_layers_say_so(tmp_path: Path) -> None:
    """GPT-2's layers are Conv1D, whose weights lie transposed."""
    saved_architecture("gpt2", tmp_path / "model")
    options = finetune.parse_options(finetune_options(tmp_path, "out", method="lora-xs", reflora_warmup_steps=None))
    message = r"method='lora-xs': transformer.h.0.attn.c_attn is a Conv1D; only nn.Linear.*, or take another --method"
    with pytest.raises(ValueError, match=message):
        finetune.add_adapter(small_architecture("gpt2"), options)


def test_every_name_must_fit_a_parameter() -> None:
    model = small_architecture("mixtral")
    names = ["mlp.experts.down_proj"]
    assert adapter_targets(model, ["q_proj"], names) == {"target_modules": ["q_proj"], "target_parameters": names}
    message = (
        r"no parameter 'experts.w1' of two .*; its stacked experts are mlp.experts.down_proj, mlp.experts.gate_up_"
    )
    with pytest.raises(ValueError, match=message):
        adapter_targets(model, ["q_proj"], ["experts.w1"])
    with pytest.raises(ValueError, match="it has no stacked experts"):
        adapter_targets(small_architecture("llama"), ["q_proj"], names)
