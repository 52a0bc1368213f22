"""Every script answers --help at once, also where no package is installed, and tells a mistake in one line."""

from __future__ import annotations

import importlib
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from launchers import ask, compare, evaluate, export
from launchers.evaluation.options import EvaluateOptions
from launchers.options import ExportOptions
from launchers.training.arguments import FinetuneArguments
from launchers.training.options import HELP_GROUPS, trainers_options
from reflora_dist.command_line import name as program_name
from reflora_dist.command_line.help import answer_help, help_text
from reflora_dist.doctor.options import DoctorOptions
from tests.support.launchers import REPOSITORY

# Python without any package: neither this environment's nor the working folder's
_BARE = [sys.executable, "-I", "-S"]
# it takes a fifth of a second; the import of torch alone takes several
_MOST_CPU_SECONDS = 1.5
# each with an option of its own
SCRIPTS = {
    "launchers/finetune.py": "--reflora_warmup_steps",
    "launchers/evaluate.py": "--num_beams",
    "launchers/export.py": "--from_state",
    "launchers/compare.py": "--plot",
    "launchers/ask.py": "--question",
    "launchers/data/embedded.py": "--pretrain-steps",
    "launchers/cluster/meeting.py": "--node_rank",
    "launchers/cluster/extension_locks.py": "--help",
    "benchmarks/attach_scale.py": "--engines",
    "benchmarks/convergence.py": "--learning_rates",
    "benchmarks/cost_model.py": "--tokens_per_gpu",
    "benchmarks/fsdp2_gathers.py": "--lora_ranks",
    "benchmarks/lora_sb_memory.py": "--batches",
    "benchmarks/matrix_factorization.py": "--iterations",
    "benchmarks/overhead.py": "--breakdown",
    "benchmarks/report.py": "--check",
    "benchmarks/scaling.py": "--fit_ranks",
    "benchmarks/shaped_link.py": "--mbits",
    "benchmarks/throughput.py": "--peak_tflops",
}
# each with something that its own head says, and whether finetune.py's options follow
SHELL_SCRIPTS = {
    "launchers/run_torchrun.sh": ("PROCESSES=N sets", True),
    "launchers/run_deepspeed.sh": ("ds_configs/zero3.json", True),
    "launchers/run_accelerate.sh": ("accelerate/fsdp2.yaml", True),
    "launchers/multinode.sh": ("--node-rank", True),
    "launchers/recipes/commonsense.sh": ("--evaluate-options", True),
    "launchers/recipes/glue.sh": ("--train-data", True),
    "launchers/quickstart.sh": ("--pretrain-steps", False),
    "tests/run.sh": ("--all-ranks", False),
    "benchmarks/gpu.sh": ("SECONDS_IN_ALL", False),
    "benchmarks/worth.sh": ("SEEDS", False),
}


def _answer(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, which may need as much CPU time as an answer may take."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < _MOST_CPU_SECONDS, f"{command} took {spent:.1f} s of CPU time"
    return done


def _named(text: str) -> set[str]:
    return set(re.findall(r"^  --(\w+)", text, re.MULTILINE))


def test_every_script_has_a_help_here() -> None:
    python = [*(REPOSITORY / "launchers").rglob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")]
    started = {path for path in python if 'runpy.run_module("launchers.' in path.read_text()}
    started |= {path for path in python if path.parent.name == "benchmarks" and '"__main__"' in path.read_text()}
    inside = {"launchers/cluster/launch.py"}  # which the shell scripts start, with a launcher's arguments
    assert {str(path.relative_to(REPOSITORY)) for path in started} - inside == SCRIPTS.keys()
    shell = [path for folder in ("launchers", "tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.sh")]
    sourced = {"launchers/environment.sh", "launchers/slurm/common.sh"}
    assert {str(path.relative_to(REPOSITORY)) for path in shell} - sourced == SHELL_SCRIPTS.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_its_help_without_any_package(script: str, tmp_path: Path) -> None:
    done = _answer([*_BARE, str(REPOSITORY / script), "--help"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert SCRIPTS[script] in done.stdout


def test_the_doctor_prints_its_help_without_any_package() -> None:
    done = _answer([sys.executable, "-E", "-S", "-m", "reflora_dist.doctor", "--help"], cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--bandwidth_gbit" in done.stdout and "[CONFIG ...]" in done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without an environment, and an interpreter without packages."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launchers", "reflora_dist", "ds_configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/run.sh", "benchmarks/gpu.sh", "benchmarks/worth.sh"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    (folder / "python").write_text(f'#!/bin/sh\nexec {" ".join(_BARE)} -B "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_a_shell_script_prints_its_help_and_installs_nothing(script: str, checkout: Path) -> None:
    before = sorted(checkout.rglob("*"))
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(checkout / "python")}
    done = _answer(["bash", script, "--help"], cwd=checkout, env=environment)
    own, has_finetunes = SHELL_SCRIPTS[script]
    assert (done.returncode, done.stderr) == (0, "")
    assert own in done.stdout and "set -" not in done.stdout
    assert done.stdout.count("--lora_ga_batches") == int(has_finetunes)
    assert sorted(checkout.rglob("*")) == before


def test_one_rank_prints_the_help() -> None:
    command = [*_BARE, str(REPOSITORY / "launchers" / "finetune.py"), "--help"]
    printed = [_answer(command, env={**os.environ, "RANK": rank}).stdout for rank in "01"]
    assert "--lora_r INT" in printed[0] and printed[1] == ""


def test_the_help_is_grouped_and_names_what_prints_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = {}
    for asked in ("--help", "--help-all"):
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--model", "x", asked])
        with pytest.raises(SystemExit) as ended:
            answer_help("What it does.", HELP_GROUPS, further=trainers_options)
        assert ended.value.code == 0
        printed[asked] = capsys.readouterr().out
    titles = [re.escape(f"\n{title}:\n") for title in HELP_GROUPS]
    assert re.search(".*".join(titles), printed["--help"], re.DOTALL)
    assert "--help-all prints" in printed["--help"] and "--help-all prints" not in printed["--help-all"]
    assert _named(printed["--help"]) < _named(printed["--help-all"])
    # a group of the help is a part of the class that is parsed
    kinds = [kind for kind in HELP_GROUPS.values() if not issubclass(FinetuneArguments, kind)]
    assert _named(printed["--help-all"]) == _parsed(*kinds, FinetuneArguments)
    assert "weight_decay" not in _named(printed["--help"])


def _parsed(*kinds: Any) -> set[str]:
    return {action.dest for action in HfArgumentParser(kinds)._actions} - {"help"}


def _benchmark(name: str) -> Any:
    module = importlib.import_module(f"benchmarks.{name}")
    return module.Scenario if name == "cost_model" else module.Arguments


def test_the_help_names_the_options_of_the_parser() -> None:
    benchmarks = [Path(script).stem for script in SCRIPTS if script.startswith("benchmarks/")]
    for kind in (EvaluateOptions, ExportOptions, DoctorOptions, *map(_benchmark, benchmarks)):
        fields: Mapping[str, Iterable[Any]] = {"options": kind.__dataclass_fields__.values()}
        assert _named(help_text("program", "doc", fields)) == _parsed(kind), kind


def test_help_all_without_transformers_says_what_is_missing(tmp_path: Path) -> None:
    done = _answer([*_BARE, str(REPOSITORY / "launchers" / "finetune.py"), "--help-all"], cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "No module named" in line and "install it first" in line


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (evaluate.main, "--num_baems 4", r"evaluate.py: error: .* --num_baems; did you mean --num_beams\?"),
        (evaluate.main, "--num_beams many", "evaluate.py: error: argument --num_beams.*: invalid int value: 'many'"),
        (export.main, "--adapter a --output_dir o stray", "export.py: error: 'stray' belongs to no option"),
        (export.main, "--adapter a", "export.py: error: the following arguments are required: --output_dir"),
    ],
)
def test_a_mistake_is_one_line(main: Any, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=message) as ended:
        main(arguments.split())
    assert "\n" not in str(ended.value) and "usage" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (compare.main, "run --plto x", "compare.py: error: there is no option --plto; did you mean --plot?"),
        (compare.main, "", "compare.py: error: the following arguments are required: runs"),
        (ask.main, "--adapter a", "ask.py: error: give either --question or --records"),
    ],
)
def test_a_mistake_of_a_small_script_is_one_line(
    main: Any, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{message}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("finetune.py: error: --lr", "reflora-train: error: --lr"),
        ("usage: finetune.py [options]", "usage: reflora-train [options]"),
        ("    python launchers/finetune.py --model NAME", "    reflora-train --model NAME"),
        (
            "    torchrun --nproc_per_node 2 launchers/finetune.py --model NAME",
            "    torchrun --nproc_per_node 2 -m reflora_dist.launchers.finetune --model NAME",
        ),
        (
            "deepspeed --num_gpus 2 launchers/finetune.py --deepspeed zero3",
            "deepspeed --num_gpus 2 --module reflora_dist.launchers.finetune --deepspeed zero3",
        ),
        ("give finetune.py a folder, not my/finetune.py", "give reflora-train a folder, not my/finetune.py"),
    ],
)
def test_a_command_speaks_of_itself_by_its_name(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_name, "_started", [])
    assert program_name.in_own_words(text) == text
    program_name.started_as(program_name.Command("reflora-train", "launchers.finetune", "launchers/finetune.py"))
    assert program_name.in_own_words(text) == expected


def test_the_doctors_command_speaks_of_itself_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_name, "_started", [program_name.Command("reflora-doctor", "doctor")])
    usage = program_name.in_own_words("usage: python -m reflora_dist.doctor [CONFIG ...]")
    assert usage == "usage: reflora-doctor [CONFIG ...]"
