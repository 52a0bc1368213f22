"""Names of models and data: a mistyped path is told with what is near, and the hub is not asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from launchers.data.records import is_local_file
from reflora_dist.engines.bare_base import adapter_folder, require_adapter
from reflora_dist.files.base_files import load_tokenizer, read_model_config
from reflora_dist.files.local_names import hint_of, no_such_path
from reflora_dist.files.stored_weights import find_model


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a model, a run and records."""
    for folder in ("model", "outputs/finetune", "outputs/evaluate", "microsoft/phi-4"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "records.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("./modle", "; did you mean model?"),
        ("recrods.jsonl", "; did you mean records.jsonl?"),
        ("outputs/finetun", "; did you mean outputs/finetune?"),
        ("./output/finetune", "; did you mean outputs/finetune?"),
        ("../nothing/like/it", ""),
        ("~/model", ""),
        ("data.parquet", ""),
        ("a/b/c", ""),
        ("with spaces", ""),
    ],
)
def test_a_mistyped_path_is_told_with_what_is_near(name: str, hint: str) -> None:
    assert no_such_path(name) == f"no such file or folder{hint}"


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "./model",
        "outputs/finetune",
        "records.jsonl",
        "gpt2",
        "meta-llama/Llama-3.2-1B",
        "microsoft/deberta-v3",
    ],
)
def test_what_exists_and_what_the_hub_may_have_passes(name: str) -> None:
    assert no_such_path(name) is None


def test_a_name_of_the_hub_that_fails_gets_the_hint_too() -> None:
    assert hint_of("modle") == "; did you mean model?"
    with pytest.raises(ValueError, match=r"model 'modle' cannot be loaded: .*; did you mean model\?$"):
        read_model_config("modle")


@pytest.mark.parametrize("load", [read_model_config, load_tokenizer, find_model, require_adapter, is_local_file])
def test_nobody_asks_the_hub_for_a_mistyped_path(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    for module in ("transformers.utils.hub.hf_hub_download", "reflora_dist.files.stored_weights.snapshot_download"):
        monkeypatch.setattr(module, ask)
    monkeypatch.setattr(HfApi, "repo_info", ask)
    assert adapter_folder("./modle") is None
    with pytest.raises(ValueError, match=r"'\./modle'.*: no such file or folder; did you mean model\?"):
        load("./modle")
