"""The embedded text, records and model: real, deterministic, split by object, and cached whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from launchers.data import stdlib_text
from launchers.data.embedded import EmbeddedSettings, ensure_model, ensure_records
from launchers.data.records import load_records
from reflora_dist.files.cache import build_once, default_cache_dir
from tests.support.launchers import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text() -> stdlib_text.StandardLibraryText:
    return stdlib_text.collect()


def test_there_is_enough_real_text(text: stdlib_text.StandardLibraryText) -> None:
    assert sum(map(len, text.documents)) > 1_000_000
    assert len(text.train_records) > 2_000
    assert 100 < len(text.held_out_records) < len(text.train_records) / 5
    everything = "\n".join(text.documents)
    assert "Return the number of items in a container" in everything + str(text.held_out_records)
    assert "def " in everything


def test_a_held_out_object_is_in_neither_training_text(text: stdlib_text.StandardLibraryText) -> None:
    trained = {record["output"].lower() for record in text.train_records}
    questions = {record["instruction"] for record in text.train_records}
    documents = {" ".join(document.split()).lower() for document in text.documents}
    for record in text.held_out_records:
        assert record["output"].lower() not in trained
        assert record["instruction"] not in questions
        docstring = f'"""{record["output"].lower()}"""'
        assert not any(docstring in document for document in documents)


def test_records_are_well_formed(text: stdlib_text.StandardLibraryText) -> None:
    shortest, longest = stdlib_text.ANSWER_CHARS
    for record in text.train_records + text.held_out_records:
        assert record["instruction"].endswith("?")
        assert shortest <= len(record["output"]) <= longest
        assert " at 0x" not in record["input"]  # would differ from run to run


def test_the_text_is_the_same_in_another_process(text: stdlib_text.StandardLibraryText) -> None:
    code = "from launchers.data import stdlib_text; print(stdlib_text.collect().digest())"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.strip() == text.digest()


def test_an_interpreter_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(stdlib_text, "INTROSPECTED_MODULES", ())
    with pytest.raises(RuntimeError, match="no readable standard library sources"):
        stdlib_text.collect()


def test_records_are_cached_as_files_that_the_launcher_reads(
    tmp_path: Path, text: stdlib_text.StandardLibraryText
) -> None:
    with pytest.raises(RuntimeError, match="is missing"):
        ensure_records(tmp_path, build=False)
    train_path, held_out_path = ensure_records(tmp_path)
    assert load_records([str(train_path)]) == text.train_records
    assert load_records([str(held_out_path)]) == text.held_out_records
    assert ensure_records(tmp_path, build=False) == (train_path, held_out_path)


@pytest.mark.all_ranks
def test_the_model_is_built_in_a_process_of_its_own_and_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if a launcher had started this process as one of two ranks
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    settings = EmbeddedSettings(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, pretrain_steps=2
    )
    folders = [ensure_model(tmp_path / name, settings) for name in ("first", "second")]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert ensure_model(tmp_path / "first", settings, build=False) == folders[0]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    assert model.num_parameters() < 60_000 and len(tokenizer) == 600
    for sample in ("def f(x):\n        return {x: 'é'}", "two  spaces", "漢字"):
        ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == sample  # byte fallback and indentation: nothing is lost


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        build_once(tmp_path, "thing", {"a": 1}, fail)
    assert list(tmp_path.iterdir()) == []


def test_of_two_jobs_that_build_at_once_the_first_wins(tmp_path: Path) -> None:
    def build_while_another_finishes(folder: Path) -> None:
        (folder / "who").write_text("slow")
        build_once(tmp_path, "thing", {"a": 1}, lambda other: (other / "who").write_text("quick") and None)

    folder = build_once(tmp_path, "thing", {"a": 1}, build_while_another_finishes)
    assert (folder / "who").read_text() == "quick"
    assert json.loads((folder / "key.json").read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "REFLORA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    assert default_cache_dir() == Path(tempfile.gettempdir()) / "reflora_dist-4000000"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir=.*is not writable"):
        build_once(tmp_path / "file" / "cache", "thing", {}, lambda folder: None)


def test_a_folder_from_which_a_cleaner_has_removed_files_is_made_again(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "content").write_text("whole")

    folder = build_once(tmp_path, "thing", {"a": 1}, build)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match="is missing"):
        build_once(tmp_path, "thing", {"a": 1}, build, build=False)
    assert build_once(tmp_path, "thing", {"a": 1}, build) == folder
    assert (folder / "content").read_text() == "whole"
