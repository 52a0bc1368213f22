"""Damaged files of a checkpoint: refused with one of three errors, or read as what it takes to go on; never half.

``pytest tests/files/test_damaged_files.py --examples 1000`` tries more.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoints.training_state import load_adapter, load_checkpoint, save_checkpoint
from reflora_dist.export.consolidate import consolidate_adapter
from tests.support.damage import damaged
from tests.support.small import small_batches, small_model, train_small, trainable
from tests.support.tally import tried

pytestmark = pytest.mark.slow
_CONFIG = RefLoRAConfig(warmup_steps=0)
_FILES = ["adapter_model.safetensors", "adapter_config.json", "reflora.json", "state/.metadata", "state/__0_0.distcp"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    handle = attach(model, optimizer, _CONFIG)
    train_small(model, optimizer, small_batches(2))
    folder = tmp_path_factory.mktemp("damaged") / "good"
    save_checkpoint(folder, model, optimizer, handle)
    assert all((folder / name).is_file() for name in _FILES)
    return folder


def _new() -> tuple[PeftModel, torch.optim.Optimizer]:
    model = small_model(seed=3)
    return model, torch.optim.AdamW(trainable(model), lr=1e-2)


def _resume(folder: Path) -> list[Tensor]:
    model, optimizer = _new()
    attach(model, optimizer, _CONFIG, state_dict=load_checkpoint(folder, model, optimizer) or None)
    return trainable(model)


def _load(folder: Path) -> list[Tensor]:
    model, optimizer = _new()
    before = [parameter.detach().clone() for parameter in trainable(model)]
    try:
        load_adapter(model, optimizer, folder)
    except Exception:
        assert all(map(torch.equal, before, trainable(model))), "refused when half of it was loaded"
        raise
    return trainable(model)


def _consolidate(folder: Path) -> list[Tensor]:
    output = folder.with_name("out")
    shutil.rmtree(output, ignore_errors=True)
    consolidate_adapter(folder, output)
    return _load(output)


@pytest.mark.parametrize("use", [_resume, _load, _consolidate], ids=["resume", "load_adapter", "consolidate"])
@given(data=st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_by_an_error_that_programs_catch(use: Any, saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(_FILES))
    folder = saved.with_name("bad")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    content = data.draw(damaged((saved / name).read_bytes(), name.endswith(".json")))
    (folder / name).write_bytes(content)
    with tried("damaged files of a checkpoint") as outcome:
        try:
            factors = use(folder)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            outcome.refused = True
            message = str(error)
            # RuntimeError only of state that does not fit this run
            assert not isinstance(error, RuntimeError) or "does not fit this run" in message, message
            assert len(message) > 20 and "weights_only" not in message, message
        else:
            assert all(bool(factor.isfinite().all()) for factor in factors)
