"""Defaults that depend on the device, the data and the length; and what a run says at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launchers import finetune
from launchers.training import arguments, plots
from launchers.training.arguments import FinetuneArguments, takes_bf16
from launchers.training.options import parse_options
from launchers.training.recorded import recorded_template
from tests.support.launchers import REPOSITORY

RECORDS, HELD_OUT = "--dataset=records.jsonl", "--eval_fraction=0.2"


@pytest.fixture
def on_a_gpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "gpu_has_bf16", lambda: True)
    monkeypatch.setattr(arguments.FinetuneArguments, "_check_fp16", lambda self: None)  # it would find no GPU


@pytest.mark.parametrize(
    ("options", "environment", "bf16"),
    [
        ([], {}, True),
        (["--bf16=False"], {}, False),
        (["--bf16"], {}, True),
        (["--use_cpu=True"], {}, False),
        ([], {"ACCELERATE_MIXED_PRECISION": "no"}, True),  # as shipped: the trainer decides
        ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, False),
        ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, False),  # which is bf16 all the same
    ],
)
@pytest.mark.usefixtures("on_a_gpu_with_bf16")
def test_bf16_is_the_default_where_the_gpu_has_it(
    options: list[str],
    environment: dict[str, str],
    bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    training = parse_options([RECORDS, *options]).training
    assert training.bf16 is bf16
    said = "training in bf16, which this GPU has; --bf16 False trains in fp32" in capsys.readouterr().out
    assert said == (bf16 and not options)
    assert training.changed_from_defaults()["bf16"] is bf16


def test_fp16_is_no_reason_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "gpu_has_bf16", lambda: True)
    training = FinetuneArguments.__new__(FinetuneArguments)
    training.use_cpu, training.fp16, training.deepspeed = False, True, None
    assert not training._bf16_by_default()
    training.fp16 = False
    assert training._bf16_by_default()


def test_a_cpu_trains_in_fp32() -> None:
    assert parse_options([RECORDS]).training.bf16 is False
    assert parse_options([RECORDS, "--bf16=True"]).training.bf16 is True


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_deepspeed_file_leaves_it_open_but_for_that_of_fp16(path: Path) -> None:
    assert takes_bf16(str(path)) == (path.stem != "zero3_fp16")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bf16": {"enabled": True}}, True),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, True),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, False),
        ({"bf16": {"enabled": False}}, False),
        ({"fp16": {"enabled": "auto"}}, False),
        ({}, False),  # DeepSpeed's own default is fp32
        ('{"bf16": {"enabled": "auto"}}', True),
        ("absent.json", False),
        ('{"bf16": ', False),
        ({"bf16": True}, False),
    ],
)
def test_deepspeeds_file_decides_if_it_says_anything(config: Any, expected: bool) -> None:
    assert takes_bf16(config) is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([RECORDS], False),
        ([RECORDS, HELD_OUT], True),
        ([RECORDS, HELD_OUT, "--eval_strategy=epoch"], True),
        ([RECORDS, HELD_OUT, "--eval_strategy=no"], False),
        ([RECORDS, HELD_OUT, "--eval_on_start=False"], False),
        ([RECORDS, HELD_OUT, "--eval_on_start", "--eval_strategy=no"], True),
        ([], True),  # the embedded records
    ],
)
def test_a_run_that_evaluates_begins_with_it(options: list[str], expected: bool) -> None:
    training = parse_options(options).training
    assert training.eval_on_start is expected
    training.leave_out_first_evaluation()
    assert training.eval_on_start is (expected and any("eval_on_start" in option for option in options))


def test_two_checkpoints_and_the_first_loss_are_kept() -> None:
    training = parse_options([RECORDS]).training
    assert (training.save_total_limit, training.logging_first_step) == (2, True)


def _metrics(**changes: Any) -> dict[str, Any]:
    metrics = {"method": "reflora", "steps": 4, "step_seconds_median": 0.25, "bytes_per_step": 1000}
    metrics |= {"peak_memory_bytes": 2**30, "peak_memory_kind": "resident set", "held_out_loss": [], "train_loss": []}
    return metrics | changes


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], "reflora: 4 steps, 250 ms"),
        ([2.5], "reflora: 4 steps, held-out loss 2.5000, 250 ms"),
        ([2.5, 1.25], "reflora: 4 steps, held-out loss 2.5000 -> 1.2500, 250 ms"),
        ([2.5, 3.0, 2.0, 2.5], "reflora: 4 steps, held-out loss 2.5000 -> 2.5000, 250 ms"),
    ],
)
def test_a_change_of_the_loss_needs_two_evaluations(losses: list[float], expected: str, tmp_path: Path) -> None:
    metrics = _metrics(held_out_loss=[{"step": step, "loss": loss} for step, loss in enumerate(losses)])
    assert finetune.summary(metrics, "out", None).startswith(expected)


def test_a_run_without_losses_has_no_plot(tmp_path: Path) -> None:
    assert plots.plot_run(_metrics(), tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert "plot" not in finetune.summary(_metrics(), "out", None)
    path = plots.plot_run(_metrics(train_loss=[{"step": 1, "loss": 2.0}]), tmp_path)
    assert path == tmp_path / "loss.png" and path.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_had_every_step_has_no_time_per_step() -> None:
    text = finetune.summary(_metrics(step_seconds_median=None, bytes_per_step=None), "out", None)
    assert text.startswith("reflora: 4 steps, peak 1.00 GiB")


def test_the_template_is_the_last_one_that_a_run_was_trained_with(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"step": 2, "seed": [1, 2]}]
    for template in ("plain", "alpaca"):
        metrics = {"settings": {"prompt_template": "plain"}, "settings_changed": changes}
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        assert recorded_template(str(tmp_path)) == template
        changes.append({"step": 4, "prompt_template": ["plain", "alpaca"]})
