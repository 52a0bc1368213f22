"""What the launch scripts install: what is missing or too old, and nothing in place of what will do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launchers import REPOSITORY

PINS = {
    line.partition("==")[0].lower(): line
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if "==" in line
}


def _missing_packages(folder: Path, *installed: str) -> tuple[int, set[str]]:
    """Exit code and pins in an environment that has these packages, and no other, as "NAME==VERSION"."""
    for entry in installed:
        name, _, version = entry.partition("==")
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    # isolated from this environment's packages, but for what reads versions
    (folder / "python").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -S "{folder}/main.py" "$@"\n')
    (folder / "python").chmod(0o755)
    packaging = Path(__import__("packaging").__file__).parent
    (folder / "packaging").symlink_to(packaging)
    (folder / "main.py").write_text(f"import sys; sys.path.insert(0, {str(folder)!r}); exec(sys.stdin.read())")
    script = f'. {REPOSITORY}/launchers/environment.sh; PYTHON={folder}/python; missing_packages "launchers"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=os.environ)
    assert not done.stderr, done.stderr
    return done.returncode, {line for line in done.stdout.splitlines() if "==" in line}


def test_a_new_environment_gets_the_versions_that_were_tested(tmp_path: Path) -> None:
    assert _missing_packages(tmp_path) == (1, set(PINS.values()))


@pytest.mark.parametrize("torch", ["2.11.0+cu128", "2.13.0"])
def test_a_torch_that_will_do_stays(torch: str, tmp_path: Path) -> None:
    code, pins = _missing_packages(tmp_path, f"torch=={torch}")
    assert code == 1 and pins == set(PINS.values()) - {PINS["torch"]}


def test_a_torch_that_is_too_old_does_not(tmp_path: Path) -> None:
    code, pins = _missing_packages(tmp_path, "torch==2.4.0+cu121")
    assert code == 1 and PINS["torch"] in pins


def test_nothing_is_installed_where_nothing_is_missing(tmp_path: Path) -> None:
    code, _ = _missing_packages(tmp_path, *PINS.values())
    assert code == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "zero3.json"),
        (["--lora_r", "4"], "zero3.json"),
        (["--config"], "zero3.json"),
        (["--config", "absent"], "zero3.json"),
        (["--config", "one_gpu_4bit"], "zero3.json"),
        (["--config", "zero3"], ""),
        (["--lora_r", "4", "--config=with.yaml"], ""),
        (["--config", "without.yaml"], "zero3.json"),
    ],
)
def test_deepspeeds_file_is_that_of_the_run_file(options: list[str], expected: str, tmp_path: Path) -> None:
    """A default on the command line would override it."""
    (tmp_path / "with.yaml").write_text("lora_r: 4\ndeepspeed: ds_configs/zero2.json\n")
    (tmp_path / "without.yaml").write_text("lora_r: 4  # deepspeed\n")
    script = f'. {REPOSITORY}/launchers/environment.sh; PYTHON={sys.executable}; default_deepspeed "$@"'
    done = subprocess.run(
        ["bash", "-euc", script, "bash", *options], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).name == expected
