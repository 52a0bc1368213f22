"""Configurations that would fail at the start are refused by the doctor, with a finding instead of a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from reflora_dist import RefLoRAConfig
from reflora_dist.collectives.tiling import Layout
from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.doctor.activations import activation_bytes
from reflora_dist.doctor.options import OPTIMIZERS
from reflora_dist.doctor.ranks import time_collectives
from reflora_dist.doctor.setup import Setup
from reflora_dist.step.traffic import Traffic
from tests.support.cluster import run_ranks
from tests.support.doctor import FSDP1, FSDP2, SMALL, ZERO3, found, written, zero3
from tests.support.launchers import REPOSITORY

ZERO3_FILE = REPOSITORY / "ds_configs" / "zero3.json"
DEEPSPEED = {"distributed_type": "DEEPSPEED", "num_processes": 4}


def fsdp(version: int, **section: Any) -> dict[str, Any]:
    """An accelerate configuration with these keys in ``fsdp_config``."""
    return {**(FSDP1 if version == 1 else FSDP2), "fsdp_config": {"fsdp_version": version, **section}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (fsdp(2, fsdp_reshard_after_forward="FULL_SHARD"), "invalid truth value full_shard"),
    (fsdp(3), "fsdp_version: 3 is unknown"),
    (fsdp(2, fsdp_auto_wrap_policy="NOSUCH"), "Invalid auto wrap policy: NOSUCH"),
    (fsdp(1, fsdp_sharding_strategy="FULLSHARD"), "KeyError: 'FULLSHARD'"),
    ({**FSDP2, "mixed_precision": "bf17"}, "mixed_precision: bf17 is not supported"),
    ({**FSDP2, "mixed_precision": False}, "mixed_precision: false is not supported"),
    ({**FSDP2, "fsdp_config": True}, "fsdp_config: True is not a section"),
    ({**FSDP2, "fsdp_config": [1]}, "fsdp_config: [1] is not a section"),
    ({**FSDP2, "fsdp_config": {1: 2}}, "fsdp_config: the key 1 is not a string"),
    ({**FSDP2, "num_machines": "two"}, "num_machines: 'two' is no whole number"),
    ({**FSDP2, "num_processes": "two"}, "num_processes: 'two' is no whole number"),
    ({**FSDP2, "num_processes": 0}, "num_processes: 0 is no whole number above 0"),
    ({**FSDP2, "num_machines": 3, "num_processes": 8}, "8 ranks on 3 machines"),
    (zero3({"fp16": True}), "transformers refuses it: AttributeError: 'bool' object has no attribute 'get'"),
    (zero3({"optimizer": "AdamW"}), "accelerate refuses it: AttributeError: 'str' object has no attribute 'get'"),
    ({**ZERO3, "zero_optimization": True}, "accelerate refuses it: AttributeError: 'bool' object has no"),
    (
        zero3({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}),
        "ds optimizer.params.betas=0.9 vs hf adam_beta1+adam_beta2",
    ),
    (
        {**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": str(ZERO3_FILE), "zero_stage": 2}},
        "following accelerate config variables will be ignored",
    ),
    (zero3({"scheduler": {"type": "WarmupLRR", "params": {}}}), "DeepSpeed does not recognize LR scheduler WarmupLRR"),
    (zero3(allgather_bucket_size="auto"), "`zero_optimization.allgather_bucket_size` not found in kwargs"),
    (zero3(overlap_comm="auto"), "`zero_optimization.overlap_comm` not found in kwargs"),
    (
        zero3({"optimizer": {"type": "SGD", "params": {"momentun": 0.9}}}),
        "DeepSpeed refuses it: TypeError: SGD.__init__() got an unexpected keyword argument 'momentun'",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    diagnosis = diagnose([written(tmp_path, config)], DoctorOptions())
    assert found(diagnosis, "error", message), diagnosis.findings
    assert not any(str(tmp_path) in finding.message for finding in diagnosis.findings), "the path is told beside it"


MODELS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"attn_implementation": "flash_attention_2"}, "no adapter can be put into it: ImportError"),
    ({"num_attention_heads": 0}, {}, "ZeroDivisionError"),
    ({"hidden_size": "wide"}, {}, "cannot be read"),
    ({"model_type": "deberta-v2"}, {}, "DebertaV2Config is no causal language model's"),
]


@pytest.mark.parametrize(("changed", "options", "message"), MODELS, ids=[message for *_, message in MODELS])
def test_models_that_cannot_be_sized(
    changed: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One line, whatever a library says."""
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "llama", **changed}))
    diagnosis = diagnose([], DoctorOptions(model=str(tmp_path), **options))
    assert found(diagnosis, "error", message), diagnosis.findings
    assert all("\n" not in finding.message for finding in diagnosis.findings)
    assert not any("--model" in finding.message for finding in diagnosis.findings)


def test_a_deepspeed_config_file_alone_is_taken(tmp_path: Path) -> None:
    config = {**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": str(ZERO3_FILE)}}
    diagnosis = diagnose([written(tmp_path, config)], DoctorOptions())
    assert not diagnosis.findings.failed, diagnosis.findings
    assert diagnosis.setup is not None and diagnosis.setup.engine == "zero3"


def test_one_layer_with_a_list_of_layer_types() -> None:
    config = Qwen2Config(**{**SMALL, "num_hidden_layers": 1})
    assert len(config.layer_types) == 1
    assert activation_bytes(config, DoctorOptions(sequence_length=16), Setup(engine="single", world_size=1)) > 0


def test_accelerate_fills_in_the_stage(tmp_path: Path) -> None:
    diagnosis = diagnose([written(tmp_path, zero3(stage="auto"))], DoctorOptions(world_size=4))
    assert not diagnosis.findings.failed, diagnosis.findings
    assert diagnosis.setup is not None and diagnosis.setup.engine == "zero2"


@pytest.mark.parametrize("name", ["fp16", "bf16", "optimizer", "scheduler", "zero_optimization"])
@pytest.mark.parametrize("value", [True, [1], "auto"])
def test_what_is_no_section_is_named(name: str, value: object, tmp_path: Path) -> None:
    """A library's own sentence says only that something has no attribute of some name."""
    findings = diagnose([written(tmp_path, zero3() | {name: value})], DoctorOptions(world_size=4)).findings
    remedies = [finding.remedy for finding in findings if finding.level == "error"]
    assert remedies == [f"{name}: {value!r} is not a section of keys and values: fill it in, or remove it"]


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [({"type": "SGD"}, 0), ({"type": "SGD", "params": {"momentum": 0.9, "lr": "auto"}}, 1), ({"type": "AdamW"}, 2)],
)
def test_moments_are_those_of_the_optimizer_that_the_file_names(
    optimizer: dict[str, Any], moments: int, tmp_path: Path
) -> None:
    """As many bytes as the fp32 masters for each; another ``--optim`` contradicts."""
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "model")
    path = written(tmp_path, zero3({"optimizer": optimizer, "zero_allow_untested_optimizer": True}))
    diagnosis = diagnose([path], DoctorOptions(model=str(tmp_path / "model"), world_size=4))
    sizes = {item.name: item.bytes for item in diagnosis.memory or ()}
    assert sizes.get("optimizer's moments", 0) == moments * sizes["factors, fp32 masters"], diagnosis.findings
    for option, kept in OPTIMIZERS.items():
        diagnosis = diagnose([path], DoctorOptions(world_size=4, optim=option))
        assert found(diagnosis, "error", f"--optim {option}, but") == (kept != moments), diagnosis.findings


# What the rank that sends most sends for 8 pairs of r = 5 on 2 ranks: where a row is cut, and where lora_A is flat.
TIMED = {"tall": {"all_reduce": 1920, "send_recv": 128}, "flat": {"all_reduce": 1920, "all_to_all": 448}}


def _sent(rank: int, world_size: int, stored: str) -> dict[str, int]:
    layouts = 8 * [Layout(3, 5, stored == "flat", chunk=8), Layout(4, 5, False, chunk=10)]
    traffic = Traffic(RefLoRAConfig(), layouts, 2, torch.device("cpu"))
    return {row["collective"]: row["sent_bytes"] for row in time_collectives(traffic, 2, torch.device("cpu"))}


@pytest.mark.all_ranks
@pytest.mark.parametrize("stored", TIMED)
def test_collectives_are_timed_within_a_copy(stored: str) -> None:
    """Copies of two of the four ranks: a rank sends all that it sends to the other one."""
    assert run_ranks(_sent, 4, stored) == 4 * [TIMED[stored]]


def _gathered(rank: int, world_size: int) -> list[tuple[str, int]]:
    """64 pairs of r = 32, whose solve is shared out on a CPU."""
    layouts = 64 * [Layout(64, 32, False, chunk=1024), Layout(64, 32, False, chunk=1024)]
    traffic = Traffic(RefLoRAConfig(), layouts, 2, torch.device("cpu"))
    return [(row["collective"], row["sent_bytes"]) for row in time_collectives(traffic, 2, torch.device("cpu"))]


def test_what_is_solved_in_shares_is_timed_too() -> None:
    of_each = [("all_reduce", 8 * 64 * 32 * 33), ("all_gather", 8 * 32 * (32 * 33 + 1))]
    assert run_ranks(_gathered, 2) == 2 * [of_each]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": None},
            "Either train_batch_size or train_micro_batch_size_per_gpu needs to be provided",
        ),
        ({"train_micro_batch_size_per_gpu": 1.5}, "ds train_micro_batch_size_per_gpu=1.5 vs hf"),
        ({"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}, "zero_allow_untested_optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -1, "torch_adam": True}}}, "Invalid learning rate: -1"),
        ({"scheduler": {}}, "'DummyScheduler' object has no attribute 'get_last_lr'"),
        ({"prescale_gradients": True}, "with reduce scatter enabled"),
        ({"bf16": None, "fp16": {"enabled": "auto"}}, "'NoneType' object has no attribute 'get'"),
    ],
)
def test_what_only_making_the_engine_would_show(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1.0}
    config |= {"zero_optimization": {"stage": 2}, **changes}
    if config["train_micro_batch_size_per_gpu"] is None:
        del config["train_micro_batch_size_per_gpu"]
    diagnosis = diagnose([written(tmp_path, config)], DoctorOptions(world_size=2))
    assert found(diagnosis, "error", message), diagnosis.findings
