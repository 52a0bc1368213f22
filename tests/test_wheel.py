"""The package that users install: its wheel works without the repository, and names what it imports."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.foreign import foreign_lines
from tests.support.launchers import REPOSITORY, micro_model, short_training, write_records

# distributions whose modules have another name
_MODULES = {"pyyaml": "yaml"}
# imported only where the user has it: under DeepSpeed, with 4-bit weights, on a GPU
_OPTIONAL = {"deepspeed", "bitsandbytes", "triton"}

_SMOKE = """
import torch
from peft import LoraConfig, get_peft_model
import reflora_dist
from reflora_dist.checkpoint import save_checkpoint  # as release 0.1 documented it
from reflora_dist.completeness import CompleteCheckpoints

layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
handle = reflora_dist.attach(model, optimizer, reflora_dist.RefLoRAConfig(warmup_steps=0))
model(torch.ones(1, 16)).sum().backward()
optimizer.step()
report = handle.report()
print(reflora_dist.__file__, report.applied_steps, report.num_pairs, report.skipped_pairs)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("reflora_dist", "launchers", "ds_configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def _shipped() -> set[str]:
    """What the wheel has to hold: the package, and in it the launchers and the configurations."""
    package = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "reflora_dist").rglob("*.py")}
    beside = [
        *(REPOSITORY / "launchers").rglob("*.py"),
        *(REPOSITORY / "launchers").rglob("*.yaml"),
        *(REPOSITORY / "ds_configs").glob("*.json"),
    ]
    return package | {f"reflora_dist/{path.relative_to(REPOSITORY).as_posix()}" for path in beside}


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"reflora_dist"}
    missing = {*_shipped(), "reflora_dist/py.typed"} - set(names)
    assert not missing, "not in the wheel; is the folder in pyproject.toml's packages? " + ", ".join(sorted(missing))


def _install(wheel: Path, folder: Path) -> Path:
    venv.create(folder)
    _run(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-index", "--no-deps", wheel
    )
    return folder


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and no other package."""
    return _install(wheel, tmp_path_factory.mktemp("alone") / "env")


@pytest.fixture(scope="module")
def complete(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and the dependencies of this environment."""
    folder = _install(wheel, tmp_path_factory.mktemp("complete") / "env")
    (own,) = (folder / "lib").glob("python*")
    (own / "site-packages" / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


COMMANDS = {"reflora-train": "--lora_r", "reflora-eval": "--num_beams", "reflora-export": "--merge"}
COMMANDS["reflora-doctor"] = "--bandwidth_gbit"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_its_help_without_its_dependencies(command: str, alone: Path, tmp_path: Path) -> None:
    text = _run(alone / "bin" / command, "--help", cwd=tmp_path)
    assert COMMANDS[command] in text and text.startswith(f"usage: {command} ")
    assert ".py " not in text.partition("\n\n")[2].partition("options:")[0], "a file that the wheel's users do not have"


@pytest.mark.parametrize("command", ["reflora-train", "reflora-eval"])
def test_a_command_names_the_extra_that_is_missing(command: str, alone: Path, tmp_path: Path) -> None:
    ended = subprocess.run([alone / "bin" / command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and line.startswith(f"{command}: error: datasets, jinja2, sentencepiece,")
    assert line.endswith('pip install "reflora_dist[launchers]"')


def test_the_wheel_works_in_a_fresh_environment(complete: Path, tmp_path: Path) -> None:
    """With the dependencies of this environment, and without the repository."""
    python = complete / "bin" / "python"
    file, applied, pairs, skipped = _run(python, "-c", _SMOKE, cwd=tmp_path).split()[-4:]
    assert Path(file).is_relative_to(complete)
    assert (applied, pairs, skipped) == ("1", "2", "0")


def test_the_command_trains_where_there_is_no_repository(complete: Path, tmp_path: Path) -> None:
    micro_model(tmp_path / "model")
    write_records(tmp_path / "records.jsonl")
    options = [*short_training(tmp_path, "out"), "--max_steps=2"]
    printed = _run(complete / "bin" / "reflora-train", *options, cwd=tmp_path, with_errors=True)
    assert foreign_lines(printed) == []
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["world_size"], metrics["report"]["applied_steps"]) == (2, 1, 1)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_command_names_itself_where_it_refuses_an_option(complete: Path, tmp_path: Path) -> None:
    command = [complete / "bin" / "reflora-train", "--lr", "1e-3"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    *_, line = ended.stderr.splitlines()
    assert ended.returncode == 1 and line.startswith("reflora-train: error: there is no option --lr; did you mean")


def test_what_the_package_imports_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {_MODULES.get(name := Requirement(line).name, name) for line in project["dependencies"]}
    imported = set()
    for path in (REPOSITORY / "reflora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names - _OPTIONAL - {"reflora_dist"} == declared


def _run(*command: str | Path, cwd: Path | None = None, with_errors: bool = False) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + (done.stderr if with_errors else "")
