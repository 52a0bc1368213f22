"""The doctor's reading of files: which library each is for, and what accelerate does with its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.doctor.diagnosis import Diagnosis
from tests.support.doctor import FSDP2, SMALL, WRAPPED, ZERO3, found, written


def test_one_file_twice_is_one_file(tmp_path: Path) -> None:
    path = written(tmp_path, ZERO3)
    diagnosis = diagnose([path, path], DoctorOptions(world_size=4))
    assert diagnosis.setup is not None and diagnosis.setup.engine == "zero3"


@pytest.mark.parametrize(
    ("name", "content", "engine"),
    [
        ("config.json", FSDP2, "fsdp2"),
        ("config.JSON", ZERO3, "zero3"),
        ("config.cfg", ZERO3, "zero3"),
        ("config.cfg", FSDP2, "fsdp2"),
    ],
)
def test_what_is_in_a_file_says_whose_it_is(name: str, content: dict[str, Any], engine: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    diagnosis = diagnose([str(tmp_path / name)], DoctorOptions(world_size=4))
    assert not diagnosis.findings.failed, diagnosis.findings
    assert diagnosis.setup is not None and diagnosis.setup.engine == engine


def test_both_kinds_in_json(tmp_path: Path) -> None:
    """They are used together, and not compared with each other."""
    (tmp_path / "launch.json").write_text(json.dumps({"distributed_type": "DEEPSPEED", "num_processes": 4}))
    diagnosis = diagnose([str(tmp_path / "launch.json"), written(tmp_path, ZERO3)], DoctorOptions())
    assert not diagnosis.findings.failed, diagnosis.findings
    assert diagnosis.setup is not None and (diagnosis.setup.engine, diagnosis.setup.world_size) == ("zero3", 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", json.dumps({**SMALL, "model_type": "llama"}), "no key that DeepSpeed knows"),
        ("config.json", "{}", "no key that DeepSpeed knows"),
        ("config.yaml", "num_processes: 4", "there is no distributed_type"),
        ("config.yaml", yaml.safe_dump(ZERO3), "DeepSpeed reads JSON only"),
        ("config.json", json.dumps([ZERO3]), "a configuration is a mapping, this is a list"),
    ],
)
def test_what_is_for_neither_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    diagnosis = diagnose([str(tmp_path / name)], DoctorOptions(world_size=4))
    assert found(diagnosis, "error", message), diagnosis.findings
    assert diagnosis.setup is None


def _fsdp2(top: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    return {**FSDP2, **(top or {}), "fsdp_config": {"fsdp_version": 2, **section}}


def _mesh(**sizes: int) -> dict[str, Any]:
    return {**FSDP2, "parallelism_config": {f"parallelism_config_{name}": size for name, size in sizes.items()}}


def _ulysses(**sizes: int) -> dict[str, Any]:
    config = {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": {"zero_stage": 3}}
    return config | {"parallelism_config": {f"parallelism_config_{name}": size for name, size in sizes.items()}}


NO_POLICY = "every rank gathers the whole model"
FOUND: list[tuple[dict[str, Any], str, str, str]] = [
    (_fsdp2(), "warning", NO_POLICY, "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
    (_fsdp2(fsdp_auto_wrap_policy="NO_WRAP"), "warning", NO_POLICY, "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
    (
        _fsdp2(fsdp_activation_checkpointing=True),
        "error",
        "fsdp_activation_checkpointing without fsdp_auto_wrap_policy",
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
    ),
    (
        _fsdp2(fsdp_auto_wrap_policy="SIZE_BASED_WRAP", fsdp_min_num_params=1000),
        "error",
        "SIZE_BASED_WRAP: FSDP2 cannot wrap a list of layers",
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
    ),
    (
        _fsdp2(**{**WRAPPED, "fsdp_sharding_strategy": "HYBRID_SHARD"}),
        "warning",
        "fsdp_sharding_strategy: HYBRID_SHARD has no effect",
        "parallelism_config",
    ),
    (
        _fsdp2(**{**WRAPPED, "fsdp_sharding_strategy": 2}),
        "warning",
        "fsdp_sharding_strategy: SHARD_GRAD_OP has no effect",
        "fsdp_reshard_after_forward: false",
    ),
    (_mesh(dp_replicate_size=4), "error", "dp_shard_size is 1", "MULTI_GPU"),
    (_mesh(dp_replicate_size=4, dp_shard_size=1), "error", "dp_shard_size is 1", "a dp_shard_size above 1"),
    (_mesh(dp_shard_size=2, cp_size=2), "note", "cp_size=2: the method is the same", "attn_implementation: sdpa"),
    (_mesh(dp_shard_size=4, cp_size=2), "error", "x cp_size 2 is 8, but there are 4 ranks", "by cp_size, 2; "),
    (_ulysses(dp_replicate_size=2, sp_size=2), "note", "sequence_parallel_size=2: the method is the same", ""),
    (_ulysses(sp_size=2), "error", "dp_replicate_size 1 x sp_size 2 is not 4", "dp_replicate_size: 2"),
    (_ulysses(dp_shard_size=2, sp_size=2), "error", "dp_shard_size=2: not beside DeepSpeed", "set 1"),
    (_mesh(dp_shard_size=4, sp_size=2), "error", "sp_size=2: sequence parallelism is DeepSpeed's", "set 1"),
    ({"distributed_type": "NO", "num_processes": 4}, "error", "starts one process, not 4", "MULTI_GPU"),
    ({"distributed_type": "MULTI_CPU", "num_processes": 4}, "warning", "only mpirun makes it 4", "mpirun_hostfile"),
    ({**FSDP2, "distributed_type": "MULTI_GPU"}, "warning", "MULTI_GPU is DDP: fsdp_config", "distributed_type: FSDP"),
]


@pytest.mark.parametrize(
    ("config", "level", "message", "remedy"), FOUND, ids=[f"{index}-{row[2]}" for index, row in enumerate(FOUND)]
)
def test_what_accelerate_does_otherwise(
    config: dict[str, Any], level: str, message: str, remedy: str, tmp_path: Path
) -> None:
    findings = diagnose([written(tmp_path, config)], DoctorOptions()).findings
    assert any(f.level == level and message in f.message and remedy in f.remedy for f in findings), findings
    assert findings.failed == (level == "error"), findings


@pytest.mark.parametrize(
    "config",
    [
        {"distributed_type": "NO"},
        {"distributed_type": False, "num_processes": 1},  # what YAML makes of NO
        {"distributed_type": "MULTI_GPU", "num_processes": 4, "use_cpu": True},
        {"distributed_type": "MULTI_CPU", "num_processes": 4, "mpirun_config": {"mpirun_hostfile": "hosts"}},
        _fsdp2(**{**WRAPPED, "fsdp_sharding_strategy": "FULL_SHARD", "fsdp_activation_checkpointing": True}),
        _mesh(dp_shard_size=4),
    ],
)
def test_what_accelerate_does_is_left_alone(config: dict[str, Any], tmp_path: Path) -> None:
    findings = diagnose([written(tmp_path, config)], DoctorOptions()).findings
    assert not [finding for finding in findings if finding.level != "note"], findings


def _gathered(diagnosis: Diagnosis) -> int:
    return next(item.bytes for item in diagnosis.memory or () if item.name == "gathered parameters")


def test_without_a_policy_all_is_gathered_at_once(small_model: str, tmp_path: Path) -> None:
    options = DoctorOptions(model=small_model, mixed_precision="bf16")
    wrapped = diagnose([written(tmp_path, FSDP2, "wrapped")], options)
    whole = diagnose([written(tmp_path, _fsdp2(), "whole")], options)
    assert _gathered(wrapped) < _gathered(whole) == 2 * sum((whole.parameters or {}).values())
    backward = "parameters for the backward"  # which find them gathered
    assert [sum(sent.what == backward for sent in d.engine_sends or ()) for d in (wrapped, whole)] == [1, 0]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["LlamaDecoderLayer", "LlamaDecoder", "LlamaDecoderLayer, LlamaMLP"])
def test_classes_to_wrap_are_the_models(version: int, name: str, small_model: str, tmp_path: Path) -> None:
    """Blanks count, and the model's own names are told."""
    section = {**WRAPPED, "fsdp_version": version, "fsdp_transformer_layer_cls_to_wrap": name}
    diagnosis = diagnose(
        [written(tmp_path, {**FSDP2, "fsdp_config": section})], DoctorOptions(model=small_model, mixed_precision="bf16")
    )
    told = [finding for finding in diagnosis.findings if finding.where == "fsdp_transformer_layer_cls_to_wrap"]
    told += [
        finding for finding in diagnosis.findings if "Could not find the transformer layer class" in finding.message
    ]
    assert diagnosis.findings.failed == bool(told) == (name != "LlamaDecoderLayer"), diagnosis.findings
    if "," not in name:  # a blank is in no model's names, about which a library is the first to complain
        assert all(finding.remedy == "leave it out, or name LlamaDecoderLayer" for finding in told)


def test_an_empty_class_name_is_passed_over_under_fsdp1(small_model: str, tmp_path: Path) -> None:
    """By PEFT's policy, by which Trainer wraps."""
    section = {**WRAPPED, "fsdp_version": 1, "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer,"}
    config = {**FSDP2, "fsdp_config": section}
    options = DoctorOptions(model=small_model, mixed_precision="bf16")
    assert not diagnose([written(tmp_path, config)], options).findings.failed


ALIASES = "l0: &l0 [x]\n" + "".join(f"l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 10)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_version: 1\n", "is there twice"),
        ("c.yaml", "distributed_type: FSDP\ndistributed_type: 'NO'\n", "'distributed_type' is there twice"),
        ("c.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        ("c.yaml", "a: " + "[" * 100_000, "nested too deep"),
        ("c.json", " " * 2_000_000 + "{}", "2,000,002 bytes"),
        ("c.yaml", "distributed_type: FSDP\nfsdp_config: &a {b: *a}\n", "unfolds to more than 100,000 values"),
        ("c.yaml", "distributed_type: FSDP\n" + ALIASES, "unfolds to more than 100,000 values"),
    ],
    ids=["twice", "twice-at-the-top", "deep-json", "deep-yaml", "huge", "in-itself", "aliases"],
)
def test_a_file_that_no_library_reads_so_ends_in_one_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    diagnosis = diagnose([str(tmp_path / name)], DoctorOptions(world_size=2))
    assert found(diagnosis, "error", message)


@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.json")
    diagnosis = diagnose([str(tmp_path / "c.json")], DoctorOptions(world_size=2))
    assert found(diagnosis, "error", "no regular file")
