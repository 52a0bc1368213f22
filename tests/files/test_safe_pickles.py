"""Checkpoints whose pickles name other things than they need are refused, by name, and nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launchers import export
from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoints.deepspeed_universal import was_round_robin
from reflora_dist.checkpoints.training_state import load_checkpoint, save_adapter, save_checkpoint
from reflora_dist.export.consolidate import consolidate_adapter
from reflora_dist.files.safe_pickles import SafeReader, load_states
from tests.support.small import small_batches, small_model, train_small, trainable

CONFIG = RefLoRAConfig(warmup_steps=0)
REFUSED = r"cannot be read \(it wants (os|posix)\.mkdir called, which no file of this kind needs\)"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> Any:
    trap = Trap(tmp_path / "sprung")
    yield trap
    assert not trap.folder.exists(), "code of the file was run"


def test_the_trap_works(tmp_path: Path) -> None:
    """What the other tests show means something."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


def saved(folder: Path) -> tuple[Any, Any]:
    """A run with a checkpoint in ``folder``."""
    model = small_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    handle = attach(model, optimizer, CONFIG)
    train_small(model, optimizer, small_batches(2))
    save_checkpoint(folder, model, optimizer, handle)
    return model, optimizer


def replace_metadata(state: Path, content: Any) -> None:
    (state / ".metadata").write_bytes(pickle.dumps(content))


def forge_size(checkpoint: Path) -> None:
    """The record notes sizes; whoever changes a file can change it, too."""
    record = checkpoint / "reflora.json"
    content = json.loads(record.read_text())
    content["files"] = {name: (checkpoint / name).stat().st_size for name in content["files"]}
    record.write_text(json.dumps(content))


def test_a_changed_metadata_of_our_own_is_refused(tmp_path: Path, trap: Trap) -> None:
    checkpoint = tmp_path / "checkpoint"
    saved(checkpoint)
    replace_metadata(checkpoint / "state", trap)
    forge_size(checkpoint)
    model = small_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    with pytest.raises((ValueError, RuntimeError), match=REFUSED):
        load_checkpoint(checkpoint, model, optimizer)
    with pytest.raises(ValueError, match=REFUSED):
        consolidate_adapter(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_as_it_was_written_is_read(tmp_path: Path) -> None:
    """All classes that DCP writes are known."""
    model, _ = saved(tmp_path / "checkpoint")
    metadata = SafeReader(tmp_path / "checkpoint" / "state").read_metadata()
    assert any("lora_A" in key for key in metadata.state_dict_metadata)
    consolidate_adapter(tmp_path / "checkpoint", tmp_path / "out")
    other = small_model()
    optimizer = torch.optim.AdamW(trainable(other), lr=1e-2)
    load_checkpoint(tmp_path / "checkpoint", other, optimizer)
    assert all(map(torch.equal, trainable(model), trainable(other)))


@pytest.mark.parametrize("missing", ["state_dict_metadata", "storage_data", "relative_path", "offset", "length"])
def test_metadata_without_a_field_is_refused(missing: str, tmp_path: Path) -> None:
    """One damaged byte renames a field of a pickle."""
    state = tmp_path / "checkpoint" / "state"
    saved(state.parent)
    damaged = (state / ".metadata").read_bytes().replace(missing.encode(), f"x{missing[1:]}".encode())
    (state / ".metadata").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"\.metadata is damaged .* take another checkpoint"):
        SafeReader(state).read_metadata()


def test_who_trusts_a_file_reads_it(tmp_path: Path) -> None:
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "a.pt")
    load_states(tmp_path / "a.pt", trust_pickles=True)
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize("legacy", [False, True])
def test_states_that_name_other_things_are_refused(legacy: bool, tmp_path: Path, trap: Trap) -> None:
    torch.save({"x": trap}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read .*--trust_pickles"):
        load_states(tmp_path / "a.pt")


_STRAYS = (".metadata", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "zero", "latest")


@pytest.mark.parametrize("stray", _STRAYS)
def test_stray_pickles_beside_an_adapter_are_not_read(stray: str, tmp_path: Path, trap: Trap) -> None:
    """The tensors' own file is taken: what is exported is what it holds."""
    model = small_model()
    adapter = tmp_path / "adapter"
    save_adapter(model, adapter)
    if stray == "zero":
        (adapter / "zero" / "x").mkdir(parents=True)
        torch.save(trap, adapter / "zero" / "x" / "fp32.pt")
        torch.save(trap, adapter / "mp_rank_00_model_states.pt")
    elif stray == "latest":
        (adapter / "latest").write_text("step")
        (adapter / "step").mkdir()
        torch.save(trap, adapter / "step" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    elif stray == ".metadata":
        replace_metadata(adapter, trap)
    else:
        torch.save({"optimizer_state_dict": trap}, adapter / stray)
    out = tmp_path / "out"
    try:
        export.main(["--adapter", str(adapter), "--output_dir", str(out)])
    except SystemExit as error:  # or it is named as an adapter that needs no export
        assert "is in PEFT's format already" in str(error)
    else:
        expected = load_file(adapter / "adapter_model.safetensors")
        found = load_file(out / "adapter_model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("kind", ["zero", "universal"])
def test_deepspeeds_files_that_name_other_things_are_refused(kind: str, tmp_path: Path, trap: Trap) -> None:
    save_adapter(small_model(), tmp_path)
    state = tmp_path / "state"
    if kind == "zero":
        state.mkdir()
        torch.save({"optimizer_state_dict": trap}, state / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    else:
        (state / "zero" / "x").mkdir(parents=True)
        torch.save(trap, state / "zero" / "x" / "fp32.pt")
    torch.save({"module": {}, "param_shapes": [], "x": trap}, state / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        consolidate_adapter(state, tmp_path / "out", adapter_config=tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        was_round_robin(state)
