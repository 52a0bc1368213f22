"""A checkpoint's folder is replaced as a whole, nothing that others wrote is removed, and one copy is always found."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoints.training_state import load_checkpoint, save_checkpoint
from reflora_dist.files.replacement import Replacement, remove
from tests.support.small import small_batches, small_model, train_small, trainable

CONFIG = RefLoRAConfig(warmup_steps=0)


class Killed(BaseException):
    """The process ends here."""


class Run:
    """A small run that saves to one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = small_model()
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=1e-2)
        self.handle = attach(self.model, self.optimizer, CONFIG)

    def step(self) -> None:
        train_small(self.model, self.optimizer, small_batches(1))

    def save(self) -> None:
        save_checkpoint(self.folder, self.model, self.optimizer, self.handle)

    def saved_steps(self) -> int:
        model = small_model()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return load_checkpoint(self.folder, model, optimizer)["steps"]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    (folder / "run1").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "run1" / "weights.bin").write_text("x")
    before = names(tmp_path)
    with pytest.raises(
        ValueError, match=r"outputs holds files and is no checkpoint .*name a folder that does not exist"
    ):
        Run(folder).save()
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", [".c.part", ".c.previous"])
@pytest.mark.parametrize("kind", ["link", "folder", "file"])
def test_what_has_the_name_of_a_part_is_refused_and_kept(name: str, kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "state").mkdir(parents=True)
    (victim / "state" / "f").write_text("x")
    if kind == "link":
        os.symlink(victim, tmp_path / name)
    elif kind == "folder":
        shutil.copytree(victim, tmp_path / name)
    else:
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} (is a link or no folder|holds files and is no checkpoint)"):
        Run(tmp_path / "c").save()
    assert names(tmp_path) == before


def test_a_link_to_the_folder_stays_one(tmp_path: Path) -> None:
    run = Run(tmp_path / "real")
    run.save()
    os.symlink(tmp_path / "real", tmp_path / "link")
    run.folder = tmp_path / "link"
    run.step()
    run.save()
    assert (tmp_path / "link").is_symlink() and run.saved_steps() == 1
    assert names(tmp_path) >= {"real/reflora.json", "link"} and not any(".part" in name for name in names(tmp_path))


def test_what_others_put_into_a_checkpoint_goes_over(tmp_path: Path) -> None:
    """A tokenizer, say; what was converted from the old state does not."""
    run = Run(tmp_path / "c")
    run.save()
    (run.folder / "tokenizer.json").write_text("mine")
    (run.folder / "more").mkdir()
    (run.folder / "more" / "notes").write_text("mine")
    (run.folder / "state_universal").mkdir()
    run.step()
    run.save()
    assert (run.folder / "tokenizer.json").read_text() == (run.folder / "more" / "notes").read_text() == "mine"
    assert not (run.folder / "state_universal").exists()
    assert run.saved_steps() == 1


def _killed_at(number: int, beside: Path) -> Callable[..., Any]:
    """`Path.rename` that ends the process in place of its n-th call on what lies in a folder; torch's own go on."""
    calls = []

    def rename(self: Path, target: Path) -> Path:
        if self.parent == beside:
            calls.append(self)
            if len(calls) == number:
                raise Killed
        return Path(os.rename(self, target) or target)

    return rename


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("second", [1, 2, 3])
def test_a_save_killed_between_renames_twice_leaves_a_copy_that_is_found(
    first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each kill the run resumes from the newest complete copy, and the next save clears up."""
    run = Run(tmp_path / "c")
    run.save()
    steps = 0
    for number in (first, second):
        run.step()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", _killed_at(number, tmp_path))
            with contextlib.suppress(Killed):
                run.save()
        saved = run.saved_steps()
        assert saved >= steps
        steps = saved
    run.step()
    run.save()
    assert run.saved_steps() == 3
    assert not any(name.startswith(".") for name in names(tmp_path) if "/" not in name)


def test_a_part_that_was_not_completed_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "c")
    run.save()
    with monkeypatch.context() as patch:
        patch.setattr("reflora_dist.checkpoints.training_state.write_record", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run.save()
    assert (tmp_path / ".c.part").is_dir() and run.saved_steps() == 0
    run.step()
    run.save()
    assert run.saved_steps() == 1 and not (tmp_path / ".c.part").exists()


@pytest.mark.parametrize("removed", [0, 1, 2])
@pytest.mark.parametrize("name", [".c.part", ".c.previous"])
def test_a_removal_that_was_killed_is_ended_by_the_next_save(
    name: str, removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "c")
    run.save()
    shutil.copytree(tmp_path / "c", tmp_path / name)
    if name == ".c.part":
        (tmp_path / name / "reflora.json").rename(tmp_path / name / ".unfinished")
    calls = itertools.count()

    def remove_some(path: Path) -> None:
        if next(calls) == removed:
            raise Killed
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr("reflora_dist.files.replacement.remove", remove_some)
        with pytest.raises(Killed):
            run.save()
    assert (tmp_path / name).is_dir()
    run.step()
    run.save()
    assert run.saved_steps() == 1
    assert not any(name.startswith(".") for name in names(tmp_path) if "/" not in name)


def test_the_parts_of_other_folders_stay(tmp_path: Path) -> None:
    other = Replacement(tmp_path / "other", "reflora.json", ())
    other.begin()
    Run(tmp_path / "c").save()
    assert other.part.is_dir()


def test_links_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    os.symlink(tmp_path / "victim", tmp_path / "link")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert names(tmp_path) == {"victim", "victim/file"}


def test_the_adapter_in_a_checkpoint_is_the_runs(tmp_path: Path) -> None:
    """The check can fail: a step changes it."""
    run = Run(tmp_path / "c")
    saved = []
    for _ in range(2):
        run.save()
        saved.append(load_file(run.folder / "adapter_model.safetensors"))
        run.step()
    assert any(not torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
