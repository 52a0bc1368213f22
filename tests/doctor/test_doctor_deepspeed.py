"""The doctor on what DeepSpeed derives from a file, and on what it refuses later than at reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.doctor.__main__ import main
from tests.support.doctor import ZERO3, found, written, zero3

WITHOUT_MICRO = {key: value for key, value in ZERO3.items() if key != "train_micro_batch_size_per_gpu"}


@pytest.mark.parametrize(
    ("batch", "options", "expected"),
    [
        ({"train_batch_size": 8}, {}, (2, 1)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 2}, {}, (2, 2)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": "auto"}, {"micro_batch_size": 1}, (1, 4)),
        ({"train_batch_size": "auto"}, {"micro_batch_size": 3}, (3, 1)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": "auto"}, {}, (4, 1)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, {}, (2, 3)),
        ({"train_micro_batch_size_per_gpu": 2}, {}, (2, 1)),
    ],
)
def test_batch_sizes_that_follow_from_the_file(
    batch: dict[str, Any], options: dict[str, int], expected: tuple[int, int], tmp_path: Path
) -> None:
    diagnosis = diagnose([written(tmp_path, {**WITHOUT_MICRO, **batch})], DoctorOptions(world_size=4, **options))
    assert not diagnosis.findings.failed, diagnosis.findings
    assert diagnosis.setup is not None
    assert (diagnosis.setup.micro_batch_size, diagnosis.setup.accumulation) == expected


MISMATCH = "DeepSpeed config values that mismatch TrainingArguments"
BATCHES: list[tuple[dict[str, int], dict[str, int], str, str]] = [
    ({"train_batch_size": 2}, {}, MISMATCH, "--micro_batch_size"),
    ({"train_batch_size": 9}, {}, MISMATCH, "--micro_batch_size"),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, {}, MISMATCH, "--micro_batch_size"),
    ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 0}, {}, "batch_size=0", "correct or remove that key"),
    ({"train_micro_batch_size_per_gpu": -1}, {}, "batch_size=-1", "correct or remove that key"),
    # accelerate takes accumulation for 1 where it is absent
    ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, {}, "16 != 2 * 1 * 4", '"auto"'),
    ({"train_batch_size": 16}, {"micro_batch_size": 1}, "step of 1 micro batches, the trainer of 4", '"auto"'),
    ({"train_batch_size": 16}, {"gradient_accumulation_steps": 4}, "step of 1 micro batches, the trainer", '"auto"'),
]


@pytest.mark.parametrize(("batch", "options", "message", "remedy"), BATCHES, ids=str)
def test_batch_sizes_that_do_not_work_out(
    batch: dict[str, int], options: dict[str, int], message: str, remedy: str, tmp_path: Path
) -> None:
    path = written(tmp_path, {**WITHOUT_MICRO, **batch})
    findings = diagnose([path], DoctorOptions(world_size=4, **options)).findings
    (error,) = [finding for finding in findings if finding.level == "error"]
    assert message in error.message and remedy in error.remedy


def _optimizer(kind: str | None = "AdamW", **params: Any) -> dict[str, Any]:
    return zero3({"optimizer": {"params": params, **({"type": kind} if kind else {})}})


def _scheduler(kind: str, **section: Any) -> dict[str, Any]:
    return zero3({"scheduler": {"type": kind, **section}})


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        zero3({"tensor_parallel": {"autotp_size": "2"}}),
        "'>' not supported between instances of 'str' and 'int' (at accelerator.py: if tp_size",
    ),
    (zero3({"scheduler": {"type": 5}}), "attribute name must be string, not 'int'"),
    (zero3({"sequence_parallel_size": 3}), "sequence_parallel_size=3, but there are 4 ranks"),
    (zero3({"sequence_parallel_size": 2, "data_parallel_size": 4}), "data_parallel_size=4 x sequence_parallel_size=2"),
    (zero3({"sequence_parallel_size": 1, "data_parallel_size": 2}), "data_parallel_size=2 x sequence_parallel_size=1"),
    (zero3({"sequence_parallel_size": "two"}), "unsupported operand type(s) for /: 'int' and 'str' (at config.py"),
    (zero3({"data_types": {"grad_accum_dtype": "fp31"}}), "'fp31' is not a valid DtypeEnum"),
    (_optimizer(None, lr=1e-3), "optimizer without type"),
    (_optimizer(learning_rate=1e-3), "FusedAdam.__init__() got an unexpected keyword argument 'learning_rate'"),
    (_optimizer("Adam", max_grad_norm=1.0), "'max_grad_norm' is not supported as an optimizer parameter"),
    (_optimizer("Lion", eps=1e-8), "FusedLion.__init__() got an unexpected keyword argument 'eps'"),
    (_optimizer(adamw_mode=True), "FusedAdam.__init__() got an unexpected keyword argument 'adamw_mode'"),
    (_optimizer("Adagrad", torch_adam=True), "Adagrad.__init__() got an unexpected keyword argument 'torch_adam'"),
    (_optimizer(lr="1e-3"), "ds optimizer.params.lr=1e-3 vs hf learning_rate"),
    (_optimizer(betas=[0.9, "0.999"]), "ds optimizer.params.betas=[0.9, '0.999'] vs hf"),
    (_scheduler("WarmupLR"), "WarmupLR() argument after ** must be a mapping, not NoneType"),
    (
        _scheduler("WarmupLR", params={"warmup_steps": 10}),
        "WarmupLR.__init__() got an unexpected keyword argument 'warmup_steps'",
    ),
    (
        _scheduler("WarmupDecayLR", params={}),
        "WarmupDecayLR.__init__() missing 1 required positional argument: 'total_num_steps'",
    ),
    (_scheduler("StepLR", params={"step_size": 10}), "DeepSpeedZeroOptimizer_Stage3 is not an Optimizer"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[f"{index}-{row[1]}" for index, row in enumerate(WRONG)])
def test_what_deepspeed_or_attach_refuses(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    diagnosis = diagnose([written(tmp_path, config)], DoctorOptions(world_size=4))
    assert found(diagnosis, "error", message), diagnosis.findings
    assert not found(diagnosis, "warning", "unknown to DeepSpeed"), diagnosis.findings


RIGHT: list[dict[str, Any]] = [
    zero3({"sequence_parallel_size": 1}),
    zero3({"sequence_parallel_size": 2}),
    zero3({"sequence_parallel_size": 2, "data_parallel_size": 2}),
    zero3({"sequence_parallel_size": 1, "data_parallel_size": 4}),
    zero3({"tensor_parallel": {"autotp_size": 1}}),
    _optimizer(lr="auto", betas="auto", eps="auto", weight_decay="auto", torch_adam=True, fused=True),
    _optimizer("Adam", lr=1e-3, adam_w_mode=False, bias_correction=True, fp32_optimizer_states=True),
    _optimizer("Adagrad", lr=1e-3, lr_decay=0.1),
    zero3({"optimizer": {"type": "AdamW"}}),
    _scheduler("WarmupLR", params={"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}),
    _scheduler("WarmupDecayLR", params={"total_num_steps": "auto", "warmup_num_steps": 10}),
]


@pytest.mark.parametrize("config", RIGHT, ids=str)
def test_what_deepspeed_takes_is_left_alone(config: dict[str, Any], tmp_path: Path) -> None:
    findings = diagnose([written(tmp_path, config)], DoctorOptions(world_size=4)).findings
    assert not [finding for finding in findings if finding.level != "note"], findings


@pytest.mark.parametrize("name", ["fp32", "float32", "torch.float32"])
def test_every_spelling_of_float32(name: str, tmp_path: Path) -> None:
    """Which has DeepSpeed take another engine for ZeRO-1 in bf16."""
    config = zero3({"data_types": {"grad_accum_dtype": name}}, stage=1)
    diagnosis = diagnose([written(tmp_path, config)], DoctorOptions(world_size=4))
    assert diagnosis.setup is not None and diagnosis.setup.engine == "zero1 (BF16_Optimizer)"


def test_a_size_of_data_parallelism_alone_has_no_effect(tmp_path: Path) -> None:
    diagnosis = diagnose([written(tmp_path, zero3({"data_parallel_size": 4}))], DoctorOptions(world_size=4))
    assert found(diagnosis, "warning", "'data_parallel_size' is unknown to DeepSpeed"), diagnosis.findings


def test_an_offloaded_optimizer_in_accelerates_file(tmp_path: Path) -> None:
    """The keys of the remedy are those of DeepSpeed's JSON, which accelerate's file can only name."""
    section = {"zero_stage": 3, "offload_optimizer_device": "cpu"}
    config = {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": section}
    findings = diagnose([written(tmp_path, config)], DoctorOptions()).findings
    (warning,) = [f for f in findings if "without an optimizer section" in f.message]
    assert "deepspeed_config_file" in warning.remedy


@pytest.mark.parametrize("value", ["nan", "inf", "0"])
def test_memory_is_a_finite_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu_memory_gib", value]) == 2
    assert f"--gpu_memory_gib {float(value)} must be a finite number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert main([]) == 2
    assert f"RANK is set but {missing} is not" in capsys.readouterr().err
