"""Damaged base models and adapters: refused by name wherever they are loaded, or read as what was meant.

``pytest tests/files/test_properties_bases.py --examples 1000`` tries more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from launchers import finetune
from launchers.evaluation.generation import base_of, generation_config, load_model
from launchers.training.options import parse_options
from reflora_dist.export.merge import merge_adapter
from reflora_dist.files.base_files import load_tokenizer
from reflora_dist.files.stored_weights import StoredWeights
from tests.support.damage import damaged
from tests.support.launchers import micro_model
from tests.support.tally import raised_by_us, tried

_FILES = [
    "base/config.json",
    "base/generation_config.json",
    "base/tokenizer_config.json",
    "base/model.safetensors.index.json",
    "base/model-00001-of-00002.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two files, and an adapter of it."""
    folder = tmp_path_factory.mktemp("bases") / "good"
    micro_model(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    assert all((folder / name).is_file() for name in _FILES)
    return folder


def _merge(folder: Path) -> None:
    shutil.rmtree(folder.with_name("merged"), ignore_errors=True)
    merge_adapter(folder / "adapter", folder.with_name("merged"), base=str(folder / "base"))
    merged, base = StoredWeights(folder.with_name("merged")), StoredWeights(folder / "base")
    assert merged.specs.keys() >= base.specs.keys()


def _evaluate(folder: Path) -> None:
    base_of(str(folder / "adapter"))
    tokenizer = load_tokenizer(str(folder / "base"))
    config = generation_config(tokenizer)
    model = load_model(str(folder / "base"), str(folder / "adapter"), torch.float32, torch.device("cpu"), config)
    assert not any(parameter.is_meta for parameter in model.parameters())


def _finetune(folder: Path) -> None:
    options = parse_options([f"--output_dir={folder}", "--target_modules=q_proj", "--report_to=none"])
    load_tokenizer(str(folder / "base"))
    model = finetune.add_adapter(finetune.load_model(str(folder / "base"), options), options)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("use", [_merge, _evaluate, _finetune], ids=["merge", "evaluate", "finetune"])
@given(data=st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_by_the_name_of_the_file(
    use: Callable[[Path], None], saved: Path, data: st.DataObject
) -> None:
    files = [name for name in _FILES if use is not _finetune or name.startswith("base/")]
    name = data.draw(st.sampled_from(files))
    folder = saved.with_name("bad")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    (folder / name).write_bytes(data.draw(damaged((saved / name).read_bytes(), name.endswith(".json"))))
    with tried("damaged base models and adapters") as outcome:
        try:
            use(folder)
        except (ValueError, FileNotFoundError) as error:
            outcome.refused = True
            message = str(error)
            assert raised_by_us(error), error
            assert str(folder / name.split("/")[0]) in message and "weights_only" not in message, message
