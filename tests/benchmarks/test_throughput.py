"""The throughput benchmark: records of real runs, its FLOP formula against counted FLOPs, and the report."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import throughput
from benchmarks.harness import models, variants
from benchmarks.harness.workloads import TrainingStep
from benchmarks.reports import throughput as report
from tests.support.benchmark_runs import record_of
from tests.support.cluster import run_ranks
from tests.support.launchers import REPOSITORY

TINY = ["--num_layers", "1", "--blocks", "2", "--steps", "2", "--seq_len", "8", "--micro_batch_size", "2"]
SHAPE = models.ModelShape(
    hidden_size=64, intermediate_size=96, num_layers=6, num_heads=4, num_key_value_heads=2, vocab_size=128
)


def _record(folder: Path, world_size: int, *arguments: str) -> dict[str, Any]:
    return record_of("throughput", folder, world_size, [*TINY, *arguments])


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = ["--accumulation_steps", "2", "--gradient_checkpointing", "--peak_tflops", "0.5"]
    return _record(tmp_path_factory.mktemp("throughput"), 1, *arguments)


def test_one_process_writes_a_record(record: dict[str, Any]) -> None:
    assert record["benchmark"] == "throughput" and "--accumulation_steps 2" in record["command"]
    results = record["results"]
    assert results["tokens_per_step_per_device"] == 2 * 2 * 8
    assert list(results["variants"]) == [*variants.METHODS, "loop"]
    assert results["largest_relative_error"]["reflora"] < 1e-5
    for figures in results["variants"].values():
        rate = 32 / (figures["step_ms"]["median"] / 1e3)
        assert figures["tokens_per_second_per_device"] == pytest.approx(rate)
        assert figures["mfu"] == pytest.approx(rate * results["model_flops_per_token"] / 0.5e12)
        assert figures["step_ms"]["count"] == 2
    assert results["variants"]["lora"]["throughput_ratio_by_block"]["median"] == 1
    assert results["peak_resident_bytes"] > 2**20


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.all_ranks) for e in ("ddp", "zero3"))])
def test_two_ranks_write_a_record(tmp_path: Path, engine: str) -> None:
    results = _record(tmp_path, 2, "--engine", engine)["results"]
    losses = list(results["first_loss"].values())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert ("loop" in results["variants"]) == (engine == "ddp")
    assert all(figures["mfu"] is None for figures in results["variants"].values())  # a CPU has no peak rate here


def test_the_script_runs_from_anywhere_and_explains_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "throughput.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--gradient_checkpointing" in done.stdout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "9b"}, "--model 9b is unknown"),
        ({"engine": "zero9"}, "--engine zero9 is unknown"),
        ({"engine": "fsdp2", "variants": ["loop"]}, "--variants loop is unknown or impossible here"),
        ({"steps": 0}, "--steps 0 must be positive"),
        ({"peak_tflops": 0.0}, "--peak_tflops 0.0 must be positive"),
        ({"engine": "zero3", "accumulation_steps": 2}, "raise --micro_batch_size instead"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        throughput.Arguments(**values)


def _counted_flops(rank: int, world_size: int, seq_len: int) -> float:
    sizes: dict[str, Any] = {"micro_batch_size": 2, "seq_len": seq_len}
    workload = TrainingStep("single", SHAPE, 4, torch.device("cpu"), **sizes, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        workload.prepare()
    return counter.get_total_flops() / (2 * seq_len)


def test_the_formula_counts_what_torch_counts() -> None:
    (counted,) = run_ranks(_counted_flops, 1, 16)
    expected = throughput.model_flops_per_token(SHAPE, 4, 16)
    # the plain attention forms both halves of the causal square
    expected += 6 * SHAPE.num_layers * SHAPE.hidden_size * 16
    # and the first layer's input, which comes from a frozen embedding, needs no gradient through q, k and v
    expected -= 2 * sum((inputs * outputs + 4 * inputs) for _, inputs, outputs in SHAPE.adapted_linears()[:3])
    assert counted == expected


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A100X", None),
        ("NVIDIA GB10", None),
    ],
)
def test_the_peak_rate_is_that_of_the_whole_name(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda")
    assert throughput.peak_flops(gpu, None) == (None if tflops is None else tflops * 1e12)
    assert throughput.peak_flops(gpu, 0.5) == 0.5e12


def _starting_losses(rank: int, world_size: int, scale: float) -> str:
    workload = TrainingStep("single", SHAPE, 4, torch.device("cpu"), micro_batch_size=2, seq_len=8)
    plain = variants._BASELINES["loop"]

    @torch.no_grad()
    def disturbed(engine: Any) -> Any:
        for lora_b in engine.weights()[1::2]:
            lora_b.mul_(scale)
        return plain(engine)

    variants._BASELINES["loop"] = disturbed
    try:
        throughput.check_first_losses(["lora", "reflora", "reflora-s", "loop"], workload, 1e-5)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_variant_that_starts_elsewhere_is_found_out() -> None:
    assert run_ranks(_starting_losses, 1, 1.0) == [""]
    (message,) = run_ranks(_starting_losses, 1, 100.0)
    assert "loop starts from loss" in message


def test_the_report_holds_the_records_figures(record: dict[str, Any]) -> None:
    text = report.markdown(record)
    for name, figures in record["results"]["variants"].items():
        assert f"| {name} | {figures['step_ms']['median']:.1f} (" in text
        assert f"{figures['mfu']:.1%}" in text
    assert "activations recomputed" in text and "of 0 TFLOP/s" not in text
    assert record["command"] in text and record["hardware"] in text

    on_gpu = copy.deepcopy(record)
    on_gpu["results"]["peak_resident_bytes"] = on_gpu["results"]["peak_flops_per_second"] = None
    for figures in on_gpu["results"]["variants"].values():
        figures |= {"mfu": None, "peak_allocated_bytes": 3 * 2**30}
    text = report.markdown(on_gpu)
    assert "peak memory, GiB" in text and "| 3.000 |" in text and "no peak rate is known" in text


def test_throughput_beside_lora_is_the_median_of_rounds(record: dict[str, Any]) -> None:
    """In the table, in the headline and above the bars, whatever the quotient of the medians is."""
    pytest.importorskip("matplotlib")
    disagreeing = copy.deepcopy(record)
    for figures in disagreeing["results"]["variants"].values():
        figures["throughput_ratio_by_block"] = {"median": 0.875, "q1": 0.75, "q3": 1.125, "count": 3}
        figures["peak_allocated_bytes"] = 3 * 2**30
    assert "| 87.50% (75.00% to 112.50%) |" in report.markdown(disagreeing)
    assert report.headline(disagreeing).count("87.50%") == 2
    (axes,) = report.plot(disagreeing).axes
    assert {text.get_text() for text in axes.texts} == {"87.5%"}


def test_the_plot_can_be_written(record: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    report.plot(record).savefig(buffer := io.BytesIO(), format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
