"""Locks that an interrupted build left: seen at once, told in words, and never taken from a build that lives."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

from launchers.cluster import extension_locks, waiting
from launchers.cluster.extension_locks import SpokenLock, describe, find_builder, remove_abandoned, speak_while_building
from tests.support.launchers import REPOSITORY, launch, micro_model, short_training, write_records

_HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(600)"


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """The place of a lock; there is none yet."""
    (tmp_path / "some_op").mkdir()
    return tmp_path / "some_op" / "lock"


@contextlib.contextmanager
def _building(lock: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock as torch does; killed, it leaves it."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, lock], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_lock_that_a_living_build_holds_stays(lock: Path) -> None:
    with _building(lock) as process:
        os.utime(lock, (0, 0))  # however long it takes
        assert not remove_abandoned(lock) and lock.exists()
        assert describe(lock).startswith(f"the build of some_op that process {process.pid} began at ")
    assert lock.exists() and remove_abandoned(lock) and not lock.exists()
    assert not remove_abandoned(lock)  # there is none


def test_a_ninja_that_goes_on_alone_still_builds(lock: Path) -> None:
    """What is left of a build whose Python process alone was killed."""
    lock.touch()
    ninja = lock.with_name("ninja")
    shutil.copy(shutil.which("sleep") or "", ninja)
    process = subprocess.Popen([ninja, "600"], cwd=lock.parent)
    try:
        deadline = time.monotonic() + 10
        while find_builder(lock) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert find_builder(lock) == process.pid and not remove_abandoned(lock)
    finally:
        process.kill()
        process.wait()
    assert remove_abandoned(lock)


@pytest.mark.parametrize(("age", "removed"), [(0, False), (590, False), (610, True)])
def test_where_other_machines_may_build_only_an_old_lock_is_removed(
    lock: Path, age: int, removed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension_locks, "_is_local", lambda path: False)
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    assert "another machine or user may have begun" in describe(lock)
    assert remove_abandoned(lock) == removed and lock.exists() != removed


def test_the_lock_of_a_faster_process_is_given_back(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes see the same abandoned lock; one removes it and builds before the other one acts."""
    lock.touch()
    os.utime(lock, (0, 0))

    def judged(path: Path) -> bool:
        path.unlink()
        path.write_text("the other's")
        return True

    monkeypatch.setattr(extension_locks, "is_abandoned", judged)
    assert not remove_abandoned(lock)
    assert lock.read_text() == "the other's" and list(lock.parent.iterdir()) == [lock]


def test_a_start_waits_in_words_and_goes_on_when_the_build_ends(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "FIRST_WORD_SECONDS", 0.2)
    monkeypatch.setattr(extension_locks, "_LOOKS_PER_SEARCH", 2)
    with _building(lock) as process:
        killing = subprocess.Popen(["bash", "-c", f"sleep 1.5; kill -9 {process.pid}"])
        own, start = SpokenLock(str(lock)), time.monotonic()
        assert own.try_acquire()
        waited = time.monotonic() - start
        killing.wait()
    assert 1 < waited < 10
    told = capfd.readouterr().err
    assert f"waiting for the build of some_op that process {process.pid} began at " in told
    assert f"removed a lock that an interrupted build left: {lock}" in told
    assert lock.exists() and find_builder(lock) is None  # it is this process's own
    own.release()
    assert not lock.exists()
    own = SpokenLock(str(lock))
    assert own.try_acquire()
    lock.unlink()
    own.release()  # whoever took it away


def test_torch_builds_what_an_interrupted_build_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own lock would wait for ever here, or load an extension that nobody has made."""
    built: list[str] = []

    def build(**given: Any) -> None:
        assert (tmp_path / "lock").exists()
        built.append(given["name"])

    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", build)
    monkeypatch.setattr(cpp_extension, "_import_module_from_library", lambda name, *rest: name)
    (tmp_path / "source.cpp").touch()
    (tmp_path / "lock").touch()
    speak_while_building()
    name = f"abandoned_{os.getpid()}"
    settings: dict[str, Any] = {"sources": [str(tmp_path / "source.cpp")], "build_directory": str(tmp_path)}
    assert cpp_extension.load(name, **settings) == name
    assert built == [name] and not (tmp_path / "lock").exists()


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def test_the_launch_scripts_remove_it_and_name_what_they_wait_for(tmp_path: Path, variable: str) -> None:
    folder = tmp_path if variable == "TORCH_EXTENSIONS_DIR" else tmp_path / "torch_extensions"
    for name in ("interrupted", "held"):
        (folder / name).mkdir(parents=True)
    (folder / "interrupted" / "lock").touch()
    script = f". {REPOSITORY}/launchers/environment.sh; PYTHON={sys.executable}; gpus=1; require_compiler"
    environment = {"TORCH_EXTENSIONS_DIR": "", variable: str(tmp_path)}
    with _building(folder / "held" / "lock") as process:
        printed = launch(["bash", "-euc", script], timeout_s=60, **environment)
    assert f"removed a lock that an interrupted build left: {folder / 'interrupted' / 'lock'}\n" in printed
    assert f"DeepSpeed will wait for the build of held that process {process.pid} began at " in printed
    assert not (folder / "interrupted" / "lock").exists() and (folder / "held" / "lock").exists()


@pytest.mark.all_ranks
def test_finetuning_goes_on_over_a_lock(tmp_path: Path) -> None:
    """Started by deepspeed's own launcher, without the script that looks for locks."""
    micro_model(tmp_path / "model")
    write_records(tmp_path / "records.jsonl")
    extensions = tmp_path / "extensions"
    if extension_locks.extensions_folder().is_dir():  # what is built already
        shutil.copytree(next(extension_locks.extensions_folder().glob("py*"), tmp_path / "none"), extensions)
    (extensions / "deepspeed_shm_comm").mkdir(parents=True, exist_ok=True)
    (extensions / "deepspeed_shm_comm" / "lock").touch()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "launchers/finetune.py"]
    command += ["--deepspeed", "ds_configs/zero2.json", *short_training(tmp_path, "out")]
    printed = launch(command, timeout_s=280, TORCH_EXTENSIONS_DIR=str(extensions))
    assert "removed a lock that an interrupted build left" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
