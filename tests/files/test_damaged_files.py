"""Damaged files of a checkpoint: refused with one of three errors, or read as what it takes to go on; never half.

``pytest tests/files/test_damaged_files.py --examples 1000`` tries more.
"""

from __future__ import annotations

import copy
import json
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
from tests.support.small import small_batches, small_model, train_small, trainable

pytestmark = pytest.mark.slow
_CONFIG = RefLoRAConfig(warmup_steps=0)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "../x", "/x", "a\0b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=3,
)
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


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, content: bytes, is_json: bool) -> bytes:
    """Cut off, zeroed, some bytes others; of JSON, a value that is missing or another."""
    kind = draw(st.sampled_from(["cut", "zero", "bytes", *["value"] * 3 * is_json]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "zero":
        return bytes(len(content))
    if kind == "bytes":
        changed = bytearray(content)
        places = st.integers(0, len(content) - 1) | st.integers(0, min(64, len(content) - 1))
        for place in draw(st.lists(places, min_size=1, max_size=8)):
            changed[place] = draw(st.integers(0, 255))
        return bytes(changed)
    tree = copy.deepcopy(json.loads(content))
    *path, last = draw(st.sampled_from(_places(tree)[1:]))
    parent = tree
    for key in path:
        parent = parent[key]
    if draw(st.booleans()):
        parent[last] = draw(_JSON)
    else:
        del parent[last]
    return json.dumps(tree).encode()


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
    try:
        factors = use(folder)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    except RuntimeError as error:  # only of state that does not fit this run
        message = str(error)
        assert "does not fit this run" in message, message
    else:
        assert all(bool(factor.isfinite().all()) for factor in factors)
        return
    assert len(message) > 20 and "weights_only" not in message, message
