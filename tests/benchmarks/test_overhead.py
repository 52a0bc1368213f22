"""The overhead benchmark: records of real runs, what is recorded and timed, and the report."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead
from benchmarks.harness import breakdown, models, variants
from benchmarks.harness.collectives import Collective, issue_all, recorded
from benchmarks.harness.interleaved import Schedule, flattened, measure_times
from benchmarks.harness.workloads import OptimizerStep
from benchmarks.reports import overhead as report
from tests.support.benchmark_runs import record_of
from tests.support.cluster import run_ranks
from tests.support.launchers import REPOSITORY

TINY = ["--num_layers", "1", "--blocks", "2", "--steps", "2"]
SHAPE = models.ModelShape(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_key_value_heads=2, vocab_size=64
)


def _record(folder: Path, world_size: int, *arguments: str) -> dict[str, Any]:
    return record_of("overhead", folder, world_size, [*TINY, *arguments])


@pytest.fixture(scope="module")
def step_record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _record(tmp_path_factory.mktemp("step"), 1, "--lora_ranks", "4", "8", "--breakdown")


def test_one_process_writes_a_record(step_record: dict[str, Any]) -> None:
    assert step_record["benchmark"] == "overhead" and step_record["world_size"] == 1
    assert "--lora_ranks 4 8" in step_record["command"] and step_record["versions"]["torch"] == torch.__version__
    runs = step_record["results"]["runs"]
    assert [run["lora_rank"] for run in runs] == [4, 8]
    for run in runs:
        assert run["num_pairs"] == 7
        assert run["adapter_parameters"] == run["lora_rank"] * (4 * 1024 + 3 * 1888)
        assert run["largest_relative_error"]["reflora"] < 1e-5
        assert set(run["variants"]) >= {"lora", "reflora", "reflora-s", "loop"}
        for figures in run["variants"].values():
            assert figures["step_ms"]["count"] == 4 and 0 < figures["step_ms"]["q1"] <= figures["step_ms"]["q3"]
            assert figures["queued_step_ms"]["count"] == 2
        assert run["variants"]["lora"]["added_step_ms"] == 0
        assert run["bare_collectives"] is None  # whole factors: nothing is sent
        assert run["breakdown_ms"]["solve"]["median"] > 0
        assert list(run["breakdown_ms"]) == ["grams", "solve", "apply", "rest"]  # the others do not occur


@pytest.mark.parametrize(
    ("engine", "scope"),
    [
        ("ddp", "step"),
        ("fsdp2", "step"),
        ("fsdp2-flat", "step"),
        *(pytest.param(engine, "training", marks=pytest.mark.all_ranks) for engine in ("zero3", "fsdp2")),
    ],
)
def test_two_ranks_write_a_record(tmp_path: Path, engine: str, scope: str) -> None:
    arguments = ["--engine", engine, "--scope", scope, "--seq_len", "8", "--micro_batch_size", "1"]
    (run,) = _record(tmp_path, 2, *arguments)["results"]["runs"]
    assert all(error < 1e-5 for error in run["largest_relative_error"].values())
    timed = "queued_step_ms" if scope == "step" else "training_step_ms"
    assert all(timed in figures for figures in run["variants"].values())
    if engine == "ddp":
        assert run["bare_collectives"] is None and "loop" in run["variants"]
        return
    assert {"gather-coalesced", "gather-each"} < set(run["variants"])
    bare = run["bare_collectives"]
    sent = run["variants"]["reflora"]["report"]["collectives_per_step"]
    assert len(bare["calls"]) == sum(sent.values())
    kinds = [call["kind"] for call in bare["calls"]]
    if engine.endswith("-flat"):
        assert kinds == ["all_to_all_single", "all_reduce", "all_to_all_single"]
        assert bare["calls"][0]["payload_bytes"] > bare["calls"][2]["payload_bytes"] > 0
    else:
        assert kinds == ["all_reduce"] and bare["calls"][0]["payload_bytes"] == 8 * 7 * 16 * 17  # both Grams of pairs
    added = run["variants"]["reflora"]["added_step_ms"]
    assert bare["added_over_bare"] == pytest.approx(added / bare["step_ms"]["median"])
    assert "added_step_ms" in bare


def test_both_storages_take_turns_in_one_run(tmp_path: Path) -> None:
    """Each is compared with its own plain LoRA, and the tall one sends its Grams alone."""
    arguments = ["--engine", "fsdp2", "--flat", "--breakdown", "--variants", "reflora", "gather-coalesced"]
    record = _record(tmp_path, 2, *arguments)
    (run,) = record["results"]["runs"]
    assert list(run["variants"]) == ["lora", "reflora", "gather-coalesced", "lora-flat", "reflora-flat"]
    assert set(run["largest_relative_error"]) == {"reflora", "reflora-flat"}
    figures = {name: run["variants"][name] for name in ("reflora", "reflora-flat")}
    for name, plain in (("reflora", "lora"), ("reflora-flat", "lora-flat")):
        difference = figures[name]["step_ms"]["median"] - run["variants"][plain]["step_ms"]["median"]
        assert figures[name]["added_step_ms"] == pytest.approx(difference)
    reports = {name: of["report"]["collectives_per_step"] for name, of in figures.items()}
    assert reports == {"reflora": {"all_reduce": 1}, "reflora-flat": {"all_to_all": 2, "all_reduce": 1}}
    assert list(run["breakdown_ms"]) == ["grams", "all_reduce", "solve", "apply", "rest"]
    assert set(run["other_breakdowns_ms"]) == {"reflora-flat", "gather-coalesced"}
    text = report.markdown(record)
    assert "lora_A is stored tall" in text and "With lora_A as PEFT stores it" in text
    assert f"| reflora-flat | {figures['reflora-flat']['step_ms']['median']:.2f} (" in text
    headline = report.headline(record)
    assert f"as PEFT stores it: {figures['reflora-flat']['added_step_ms']:.1f} ms more" in headline


def test_the_script_runs_from_anywhere_and_explains_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "overhead.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--lora_ranks" in done.stdout


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "9b"}, "--model 9b is unknown; choose one of smollm2, small"),
        ({"scope": "epoch"}, "--scope epoch"),
        ({"engine": "zero3"}, "--engine zero3 needs a model to shard: use --scope training"),
        ({"variants": ["gather-each"]}, "--variants gather-each is unknown or impossible here"),
        ({"engine": "fsdp2", "variants": ["loop"]}, "--variants loop"),
        ({"backend": "mpi"}, "--backend mpi is unknown; choose one of gloo, nccl"),
        ({"lora_ranks": [0]}, r"--lora_ranks \[0\]"),
        ({"blocks": 0}, "--blocks 0 must be positive"),
        ({"flat": True}, "--flat needs an engine that stores lora_A tall, --engine single does not"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overhead.Arguments(**values)


def test_one_process_alone_is_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--engine single is one process"):
        overhead.Arguments()


def _collectives(rank: int, world_size: int) -> tuple[list[dict[str, Any]], float]:
    from reflora_dist.collectives.communicator import Communicator

    communicator = Communicator(torch.distributed.group.WORLD, torch.device("cpu"))
    payload = torch.ones(6, dtype=torch.float64)
    counts = {1 - rank: 3}
    with recorded() as calls:
        communicator.all_reduce([payload])
        torch.distributed.all_reduce(torch.ones(1))  # an engine's, not the package's
        communicator.all_gather(payload)
        communicator.between_neighbours(payload[:3], counts, counts)
    communicator.all_reduce([payload])  # after the recording
    communicator.all_gather(payload)
    communicator.between_neighbours(payload[:3], counts, counts)
    issue_all(calls)
    return [call.as_dict() for call in calls], float(payload.sum())


def test_only_the_packages_collectives_are_recorded_and_repeated() -> None:
    for calls, unchanged in run_ranks(_collectives, 2):
        (reduced, gathered, exchanged) = calls
        assert reduced == {"kind": "all_reduce", "payload_bytes": 48, "dtype": "float64"}
        assert gathered["kind"].startswith("all_gather") and gathered["payload_bytes"] == 2 * 48
        assert exchanged == {"kind": "batch_isend_irecv", "payload_bytes": 24, "dtype": "float64"}
        assert unchanged == 6


def _issued(rank: int, world_size: int) -> list[float]:
    """Milliseconds that slow collectives take by themselves, and of a plain step with and without them."""
    workload = OptimizerStep(SHAPE, 4, torch.device("cpu"), "single")
    calls = [Collective("all_reduce", 8, "float64", lambda: time.sleep(0.02))] * 2
    schedule = Schedule(blocks=1, steps=2, block_seconds=10)
    times, bare, placed = measure_times({"lora": workload}, schedule, torch.device("cpu"), lambda: None, calls)
    return [flattened(of.step_ms)[0] for of in (bare, placed, times["lora"])]


def test_collectives_are_timed_by_themselves_and_before_an_update() -> None:
    ((bare, placed, plain),) = run_ranks(_issued, 1)
    assert bare >= 40 and placed >= 40 and plain < 40


def _phases(rank: int, world_size: int, engine: str) -> dict[str, float]:
    workload = OptimizerStep(SHAPE, 4, torch.device("cpu"), engine)
    with variants.installed("reflora", workload.trainee), breakdown.timed_phases(torch.device("cpu")) as elapsed_ms:
        workload.prepare()
        workload.step()
    with variants.installed("gather-coalesced", workload.trainee):
        workload.prepare()
        with breakdown.timed_phases(torch.device("cpu"), breakdown.BASELINE_PHASES) as baseline_ms:
            workload.step()
    return elapsed_ms | baseline_ms


@pytest.mark.parametrize(("engine", "sending"), [("fsdp2", {"all_reduce"}), ("fsdp2-flat", {"exchange", "all_reduce"})])
def test_the_phases_are_those_of_the_layout(engine: str, sending: set[str]) -> None:
    """A flat lora_A is exchanged beside the Grams; else Grams are all that is sent."""
    for elapsed_ms in run_ranks(_phases, 2, engine):
        assert set(elapsed_ms) == {"grams", "solve", "apply", "gather"} | sending
        assert min(elapsed_ms.values()) > 0


def test_a_phase_inside_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    monkeypatch.setattr(breakdown, "PHASES", {"outer": (f"{__name__}:_outer",), "inner": (f"{__name__}:_inner",)})
    original = module._outer
    with breakdown.timed_phases(torch.device("cpu")) as elapsed_ms:
        module._outer()
    assert 20 <= elapsed_ms["inner"] < 40 and elapsed_ms["outer"] < 20
    assert module._outer is original


def _outer() -> None:
    _inner()


def _inner() -> None:
    time.sleep(0.02)


def test_a_phase_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "PHASES", {"grams": ("reflora_dist.algebra.tall_blocks:BlockSet.no_such_function",)})
    with (
        pytest.raises(RuntimeError, match=r"BlockSet\.no_such_function does not exist; adapt PHASES"),
        breakdown.timed_phases(torch.device("cpu")),
    ):
        pass


def _as_on_a_gpu(record: dict[str, Any]) -> dict[str, Any]:
    record = copy.deepcopy(record)
    for run in record["results"]["runs"]:
        for figures in run["variants"].values():
            figures["memory"] = dict.fromkeys(("held_bytes", "step_peak_bytes", "training_peak_bytes"), 3 * 2**20)
        run["bare_collectives"] = {
            "calls": [{"kind": "all_reduce", "payload_bytes": 48_000, "dtype": "float64"}],
            "step_ms": {"median": 1.5, "q1": 1.0, "q3": 2.0, "count": 4},
            "added_over_bare": 1.75,
            "added_step_ms": 2.25,
        }
    return record


def test_the_report_holds_the_records_figures(step_record: dict[str, Any]) -> None:
    text = report.markdown(step_record)
    for run in step_record["results"]["runs"]:
        assert f"r = {run['lora_rank']}: 7 adapters" in text
        for name, figures in run["variants"].items():
            assert f"| {name} | {figures['step_ms']['median']:.2f} (" in text
        assert f"| {run['breakdown_ms']['grams']['median']:.2f} |" in text
    assert step_record["command"] in text and step_record["hardware"] in text and step_record["date"] in text

    text = report.markdown(_as_on_a_gpu(step_record))
    assert "peak of the optimizer step, MiB" in text and "| 3.0 | 3.0 |" in text
    assert "all_reduce of 48,000 bytes" in text and "adds 1.75 times" in text and "add 2.25 ms" in text


def test_the_plot_can_be_written(step_record: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    without_phases = copy.deepcopy(step_record)
    for run in without_phases["results"]["runs"]:
        run["breakdown_ms"] = None
    for record, panels in ((step_record, 2), (without_phases, 1)):
        figure = report.plot(record)
        figure.savefig(buffer := io.BytesIO(), format="png")
        assert len(figure.axes) == panels and buffer.getvalue().startswith(b"\x89PNG")
