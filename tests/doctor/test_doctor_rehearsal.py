"""The run in small by which the doctor has libraries judge files: what it may refuse, and what it leaves behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from reflora_dist.doctor import DoctorOptions, diagnose, rehearsal
from reflora_dist.doctor.tables import text
from tests.support.doctor import FSDP2, WRAPPED, found, written, zero3

LAMB = {"type": "Lamb", "params": {"lr": "auto"}}
FP16 = {"bf16": None, "fp16": {"enabled": True}}
# What this machine's CPU, or DeepSpeed on CPUs, does not do.
FOR_GPUS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (zero3(FP16), {}),
    (zero3(FP16, offload_optimizer={"device": "cpu"}), {}),
    (zero3({"optimizer": LAMB, "zero_allow_untested_optimizer": True}, stage=1), {"method": "lora"}),
    (zero3({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}, "zero_allow_untested_optimizer": True}), {}),
    (zero3(zero_quantized_weights=True), {}),
    (zero3({"tensorboard": {"enabled": True, "output_path": "boards"}}), {}),
    ({**FSDP2, "mixed_precision": "fp16"}, {}),
    ({**FSDP2, "dynamo_config": {"dynamo_backend": "INDUCTOR"}}, {}),
    ({**FSDP2, "main_process_port": 29500}, {}),
    ({**FSDP2, "num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29500, "machine_rank": 1}, {}),
    ({"distributed_type": "MULTI_GPU", "num_processes": 4, "mixed_precision": "fp16", "gpu_ids": "0,1,2,3"}, {}),
]


@pytest.mark.parametrize(("config", "options"), FOR_GPUS, ids=str)
def test_what_this_machine_lacks_says_nothing_about_the_file(
    config: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left behind: no variables, no group, no files."""
    path = written(tmp_path, config)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = dict(os.environ)
    diagnosis = diagnose([path], DoctorOptions(world_size=4, **options))
    assert not diagnosis.findings.failed, diagnosis.findings
    assert diagnosis.setup is not None
    assert (dict(os.environ), os.listdir(), dist.is_initialized()) == (before, [], False)


def test_what_needs_a_gpus_kernels_is_named(tmp_path: Path) -> None:
    diagnosis = diagnose([written(tmp_path, zero3(zero_quantized_weights=True))], DoctorOptions(world_size=4))
    assert found(diagnosis, "warning", "could be tried in small only in part: DeepSpeed's kernel"), diagnosis.findings


def test_an_unreadable_model_is_one_error(tmp_path: Path) -> None:
    findings = diagnose([written(tmp_path, zero3())], DoctorOptions(world_size=4, model=str(tmp_path))).findings
    assert [finding.where for finding in findings if finding.level == "error"] == ["--model"], findings


def test_warnings_of_libraries_are_told(tmp_path: Path) -> None:
    section = {**WRAPPED, "fsdp_backward_prefetch": "BACKWARD_PRE"}
    diagnosis = diagnose([written(tmp_path, {**FSDP2, "fsdp_config": section})], DoctorOptions())
    assert found(diagnosis, "warning", "accelerate: backward_prefetch is not supported in FSDP2"), diagnosis.findings
    assert not diagnosis.findings.failed


def test_what_is_said_in_every_run_is_no_warning(tmp_path: Path) -> None:
    path = written(tmp_path, zero3({"gradient_accumulation_steps": 3}))
    findings = diagnose([path], DoctorOptions(world_size=4)).findings
    assert not [finding for finding in findings if finding.level != "note"], findings


def test_without_a_model_it_says_what_it_has_not_looked_at(small_model: str, tmp_path: Path) -> None:
    path = written(tmp_path, zero3())
    without = diagnose([path], DoctorOptions(world_size=4))
    told = [finding for finding in without.findings if finding.where == "--model"]
    assert [finding.level for finding in told] == ["note"] and "have not been checked" in told[0].message
    assert text(without).splitlines()[-1].endswith("without --model no more was looked at.")
    whole = diagnose([path], DoctorOptions(world_size=4, model=small_model))
    assert not [finding for finding in whole.findings if finding.where == "--model"]
    assert text(whole).splitlines()[-1] == "Nothing stands in the way of the run."


HUGE: list[tuple[dict[str, Any], str]] = [
    ({"train_micro_batch_size_per_gpu": 10**9}, ""),
    ({"gradient_clipping": 10**400}, "mismatch TrainingArguments"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [10**400, 0.9]}}}, "optimizer.params.betas"),
]


@pytest.mark.parametrize(("top", "message"), HUGE, ids=["batch", "clipping", "betas"])
def test_huge_numbers_take_neither_time_nor_memory(top: dict[str, Any], message: str, tmp_path: Path) -> None:
    findings = diagnose([written(tmp_path, zero3(top))], DoctorOptions(world_size=4)).findings
    errors = [finding.message for finding in findings if finding.level == "error"]
    assert len(errors) == bool(message) and all(message in error for error in errors), findings


def test_the_process_for_it_is_started_again(tmp_path: Path) -> None:
    path = written(tmp_path, zero3())
    assert not diagnose([path], DoctorOptions(world_size=4)).findings.failed
    server = rehearsal._servers[os.getpid()]
    server.kill()
    server.wait()
    assert not diagnose([path], DoctorOptions(world_size=4)).findings.failed
