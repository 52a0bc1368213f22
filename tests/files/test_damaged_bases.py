"""A base model, adapter or tokenizer that cannot be used ends each entry point in one line, before anything is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launchers import evaluate, export, finetune
from launchers.training.classification import load_model
from launchers.training.options import parse_options
from tests.support.launchers import micro_model, write_records

Change = Callable[[Path], Any]
_INDEX = "model.safetensors.index.json"


def _weights(change: Callable[[bytes], bytes]) -> Change:
    return lambda base: (base / "model.safetensors").write_bytes(change((base / "model.safetensors").read_bytes()))


def _config(**values: Any) -> Change:
    return lambda base: (base / "config.json").write_text(
        json.dumps({**json.loads((base / "config.json").read_text()), **values})
    )


def _text(name: str, text: str) -> Change:
    return lambda base: (base / name).write_text(text)


def _lacks(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _index(text: str) -> Change:
    def change(base: Path) -> None:
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        (base / _INDEX).write_text(text)

    return change


_DAMAGE: dict[str, tuple[Change, str]] = {
    "no weights": (lambda base: (base / "model.safetensors").unlink(), "base holds no model.safetensors .*download"),
    "truncated": (_weights(lambda content: content[: len(content) // 2]), r"model\.safetensors cannot be read .*anew"),
    "zeroed": (_weights(lambda content: bytes(len(content))), r"model\.safetensors cannot be read .*anew"),
    "empty": (_weights(lambda content: b""), r"model\.safetensors cannot be read .*anew"),
    "a weight is missing": (_lacks, r"lacks 1 of .*up_proj\.weight.*anew|up_proj.* download the model again"),
    "text for a size": (_config(hidden_size="x"), r"config\.json cannot be read .*hidden_size.*correct it"),
    "no heads": (_config(num_attention_heads=0), r"config\.json cannot be read .*correct it"),
    "no layers": (_config(num_hidden_layers=-1), r"config\.json cannot be read .*num_hidden_layers is -1.*correct it"),
    "too many layers": (
        _config(num_hidden_layers=10**9),
        r"config\.json says num_hidden_layers=1000000000.*correct it",
    ),
    "another size": (_config(vocab_size=7), r"(embed_tokens|lm_head).*(anew|base)"),
    "unknown dtype": (_config(dtype="x"), r"config\.json cannot be read .*correct it"),
    "unknown kind": (_config(model_type="x"), r"config\.json cannot be read .*correct it"),
    "config is a list": (_text("config.json", "[]"), r"config\.json holds \[\] where a JSON object is wanted"),
    "config ends early": (_text("config.json", "{"), r"config\.json cannot be read"),
    "index is a number": (_index("3"), rf"{_INDEX} holds 3 where a JSON object is wanted"),
    "index of nothing": (_index('{"weight_map": null}'), rf"{_INDEX} holds weight_map as None"),
    "index of numbers": (_index('{"weight_map": {"a": 3}}'), rf"{_INDEX} names the file 3"),
    "index of missing": (_index('{"weight_map": {"a": "x.safetensors"}}'), r"x\.safetensors is missing"),
}
_OF_TOKENIZERS: dict[str, tuple[Change, str]] = {
    "tokenizer's list": (_text("tokenizer_config.json", "[]"), r"tokenizer_config\.json holds \[\]"),
    "tokenizer's class": (
        _text("tokenizer_config.json", '{"tokenizer_class": 3}'),
        r"cannot be loaded from tokenizer_c",
    ),
    "tokenizer's file": (_text("tokenizer.json", "{}"), r"cannot be loaded from .*tokenizer\.json"),
    "generation's list": (_text("generation_config.json", "[]"), r"generation_config\.json holds \[\]"),
}


def _bin(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"no pickle" * 50)


_LOADED = {
    **_DAMAGE,
    **_OF_TOKENIZERS,
    "unreadable .bin": (_bin, r"pytorch_model\.bin cannot be read .*as safetensors"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "good"
    micro_model(folder / "base")
    write_records(folder / "records.jsonl")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    (folder / "data" / "boolq").mkdir(parents=True)
    question = {
        "instruction": "Is it? true/false",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    }
    (folder / "data" / "boolq" / "test.json").write_text(json.dumps([question]))
    return folder


def _changed(good: Path, tmp_path: Path, change: Change) -> Path:
    folder = shutil.copytree(good, tmp_path / "bad")
    change(folder / "base")
    return folder


@pytest.mark.parametrize("damage", _LOADED)
def test_finetune(damage: str, good: Path, tmp_path: Path) -> None:
    change, message = _LOADED[damage]
    folder = _changed(good, tmp_path, change)
    options = [
        f"--model={folder / 'base'}",
        f"--dataset={folder / 'records.jsonl'}",
        f"--cache_dir={tmp_path / 'cache'}",
    ]
    with pytest.raises(SystemExit, match=f"^finetune.py: error: .*{message}") as raised:
        finetune.main([*options, f"--output_dir={tmp_path / 'out'}", "--max_steps=1"])
    assert str(folder / "base") in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", _LOADED)
def test_evaluate(damage: str, good: Path, tmp_path: Path) -> None:
    change, message = _LOADED[damage]
    folder = _changed(good, tmp_path, change)
    options = [f"--model={folder / 'base'}", f"--adapter={folder / 'adapter'}", f"--data={folder / 'data'}"]
    with pytest.raises(SystemExit, match=f"^evaluate.py: error: .*{message}") as raised:
        evaluate.main([*options, "--tasks", "boolq", f"--output_dir={tmp_path / 'out'}", "--disable_tqdm=True"])
    assert str(folder / "base") in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", _DAMAGE)
def test_export(damage: str, good: Path, tmp_path: Path) -> None:
    change, message = _DAMAGE[damage]
    folder = _changed(good, tmp_path, change)
    options = [f"--adapter={folder / 'adapter'}", f"--model={folder / 'base'}", "--merge=True"]
    with pytest.raises(SystemExit, match=f"^export.py: error: .*{message}") as raised:
        export.main([*options, f"--output_dir={tmp_path / 'out'}"])
    assert str(folder / "base") in str(raised.value) and not (tmp_path / "out").exists()


def test_a_classifier_may_lack_its_head_but_no_layer(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "bad")
    arguments = ["--task=seq-cls", "--glue_task=mrpc", f"--model={folder / 'base'}", f"--output_dir={tmp_path / 'out'}"]
    options = parse_options(arguments)
    assert load_model(str(folder / "base"), options, torch.float32).score.weight.shape == (2, 32)
    _lacks(folder / "base")
    with pytest.raises(ValueError, match=r"lacks 1 of its weights \(model\.layers\.1\.mlp\.up_proj\.weight, \.\.\.\)"):
        load_model(str(folder / "base"), options, torch.float32)


def test_an_adapter_of_another_r_is_no_base(good: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is an adapter with r=4, and this run's would have 16: give --lora_r 4"):
        finetune.main(
            [
                f"--model={good / 'adapter'}",
                f"--tokenizer={good / 'base'}",
                f"--dataset={good / 'records.jsonl'}",
                f"--output_dir={tmp_path / 'out'}",
                f"--cache_dir={tmp_path / 'cache'}",
            ]
        )
