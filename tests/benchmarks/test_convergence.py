"""The convergence benchmark: the same start for all methods, sweeps that continue, statistics that are exact."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import convergence
from benchmarks.harness.names import SWEPT_METHODS
from benchmarks.reports.convergence import markdown, plot
from benchmarks.sweep import tasks as sweep_tasks
from benchmarks.sweep.data import Material, prepare
from benchmarks.sweep.runs import Workbench
from benchmarks.sweep.same_start import assert_same_start
from benchmarks.sweep.tasks import Schedule, Task, load_finished
from launchers.data.tokenization import IGNORE_INDEX
from tests.support.launchers import launch, micro_model, write_records

CPU = torch.device("cpu")
SCHEDULE = Schedule(
    steps=4, start="zero", warmup_steps=2, lr_warmup_steps=1, batch_size=2, lora_rank=2, latent_rank=3, eval_every=2
)
SCRIPT = "benchmarks/convergence.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_model(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def material(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    records = write_records(tmp_path_factory.mktemp("records") / "records.jsonl")
    return prepare(
        str(model), [str(records)], [], max_length=96, max_eval_records=4, eval_fraction=0.2, cache_dir=Path("unused")
    )


@pytest.fixture(scope="module")
def bench(material: Material) -> Workbench:
    return Workbench(material, SCHEDULE, CPU)


def options(model: Path, folder: Path) -> list[str]:
    """A sweep of seconds."""
    records = write_records(folder / "records.jsonl")
    text = f"--model {model} --dataset {records} --eval_fraction 0.2 --max_eval_records 4 --max_length 96"
    sizes = "--steps 4 --warmup_steps 2 --lr_warmup_steps 1 --batch_size 2 --lora_rank 2 --latent_rank 3 --eval_every 2"
    sizes += " --timed_rounds 2"
    return f"{text} {sizes} --seeds 0 1 --learning_rates 1e-3 1e-2".split()


def test_a_sweep_writes_a_record_and_continues_where_it_was_interrupted(model: Path, tmp_path: Path) -> None:
    output, lines = tmp_path / "results" / "sweep.json", tmp_path / "results" / "sweep.jsonl"
    methods = ["lora", "reflora", "lora-rite", "lora-sb"]
    command = [sys.executable, SCRIPT, *options(model, tmp_path), "--output", output, "--methods", *methods]
    count = 2 * 2 * len(methods)
    assert f"{count} runs, 0 finished before" in launch([*command, "--workers", "2"], timeout_s=300)
    record = json.loads(output.read_text())
    assert record["benchmark"] == "convergence" and record["versions"]["torch"] and record["arguments"]["steps"] == 4
    assert list(record["results"]["methods"]) == methods == list(record["results"]["step_ms"])
    assert len(record["results"]["runs"]) == count == len(lines.read_text().splitlines())

    # killed in the middle of a line: that run is repeated, the others are not, and nothing changes
    lines.write_text(lines.read_text()[:-100])
    text = launch([*command, "--workers", "1"], timeout_s=300)
    assert f"{count} runs, {count - 1} finished before" in text
    again = json.loads(output.read_text())
    assert again["results"]["paired"] == record["results"]["paired"]
    for method in methods:
        assert f"| {method} |" in text
        assert again["results"]["methods"][method] == record["results"]["methods"][method]
    assert markdown(again) in text
    assert len(plot(again).axes) == 3


def test_chosen_rates_are_tried_from_scaled_starts_and_at_another_rank(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [SCRIPT, *options(model, tmp_path), "--methods", "lora", "reflora", "--workers", "1"]

    def record(name: str, *further: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [*common, "--output", str(tmp_path / name), *further])
        convergence.main()
        found: dict[str, Any] = json.loads((tmp_path / name).read_text())["results"]
        return found

    tuned = record("tuned.json", "--alphas", "1", "2")
    assert {run["alpha"] for run in tuned["runs"]} == {1.0, 2.0} and len(tuned["runs"]) == 16
    assert "| lora | 1 r |" in capsys.readouterr().out
    drawn = ["--start", "drawn", "--only_tuned", "True", "--tuned_in", str(tmp_path / "tuned.json")]
    scaled = record("scaled.json", *drawn, "--start_scales", "1", "0.1")
    assert len(scaled["runs"]) == 2 * 2 * 2
    for method, entries in scaled["start_scales"].items():
        assert [entry["start_scale"] for entry in entries] == [0.1, 1.0]
        used = {(run["learning_rate"], run["alpha"]) for run in scaled["runs"] if run["method"] == method}
        assert used == {(tuned["methods"][method]["best_learning_rate"], tuned["methods"][method]["alpha"])}
        assert entries[0]["final_loss"] != entries[1]["final_loss"]
    assert "moved by c = 0.1" in capsys.readouterr().out
    wide = record("wide.json", "--lora_rank", "4", "--tuned_in", str(tmp_path / "tuned.json"), "--alphas", "2")
    assert set(wide["regret"]) == {"lora", "reflora"} and None not in wide["regret"].values()
    assert "lr chosen elsewhere" in capsys.readouterr().out


def test_a_record_holds_what_all_of_its_seeds_have_finished() -> None:
    runs = {
        Task("lora", 1e-3, 0): "a",
        Task("lora", 1e-3, 1): "b",
        Task("lora", 2e-3, 0): "c",
        Task("reflora", 1e-3, 0): "d",
    }
    finished: dict[Task, Any] = dict(runs)
    finished |= {Task("lora", 1e-3, seed, alpha=4.0): "e" for seed in (0, 1)}
    asked = convergence.Arguments
    assert convergence.complete(finished, asked(methods=["lora", "reflora"], seeds=[0, 1])) == ["a", "b"]
    assert convergence.complete(finished, asked(methods=["reflora", "lora"], seeds=[0])) == ["d", "a", "c"]
    assert convergence.complete(finished, asked(methods=["lora"], seeds=[0, 1], alphas=[4.0])) == ["e", "e"]


def test_a_sweep_trains_beyond_its_grid_until_the_best_rate_is_inside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ["--methods", "lora", "--workers", "1", "--extend", "True", "--seeds", "0"]
    monkeypatch.setattr(
        sys, "argv", [SCRIPT, *options(model, tmp_path), *one, "--output", str(tmp_path / "grown.json")]
    )
    convergence.main()
    tuned = json.loads((tmp_path / "grown.json").read_text())["results"]["methods"]["lora"]
    rates = tuned["learning_rates"]
    assert len(rates) > 2 and {1e-3, 1e-2} < set(rates)
    ratios = [high / low for low, high in itertools.pairwise(rates)]
    assert ratios == pytest.approx([10.0] * len(ratios))
    inside = tuned["best_inside_grid"] and not tuned["good_range"]["low_open"] and not tuned["good_range"]["high_open"]
    assert inside or len(rates) >= 2 + convergence.MAX_EXTENSIONS


def test_a_base_in_bf16_leaves_the_adapters_in_fp32(material: Material) -> None:
    bench = Workbench(material, Schedule(**{**vars(SCHEDULE), "bf16": True}), CPU)
    assert {parameter.dtype for parameter in bench.trained} == {torch.float32}
    assert bench.model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16
    run = bench.run(Task("reflora", 1e-2, 0))
    assert run["held_out_losses"][0] == pytest.approx(_untouched_loss(material), rel=1e-2)
    assert run["held_out_losses"][-1] < run["held_out_losses"][0]


def test_sgd_gives_refloras_gradients_their_own_lengths(material: Material) -> None:
    bench = Workbench(material, Schedule(**{**vars(SCHEDULE), "optimizer": "sgd"}), CPU)
    assert isinstance(bench.reset(Task("lora", 1e-2, 0)), torch.optim.SGD)
    runs = [bench.run(Task(method, 1e-1, 0)) for method in ("lora", "reflora")]
    assert_same_start(runs, SCHEDULE.warmup_steps)
    assert runs[0]["held_out_losses"][-1] != runs[1]["held_out_losses"][-1] < runs[1]["held_out_losses"][0]


def test_one_half_of_the_held_out_records_chooses_and_the_other_is_reported(material: Material) -> None:
    assert len(material.choosing) == len(material.held_out) == 2
    parts = [{tuple(example["input_ids"]) for example in part} for part in (material.choosing, material.held_out)]
    assert not parts[0] & parts[1]


def test_runs_of_other_settings_are_not_taken_over(bench: Workbench, material: Material, tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    run = bench.run(Task("lora", 1e-2, 0))
    description = material.describe()
    settings = sweep_tasks.settings_digest(description, SCHEDULE, CPU)
    sweep_tasks.append_finished(path, {"settings": settings, **run})
    assert list(load_finished(path, settings)) == [Task("lora", 1e-2, 0)]
    for other in (
        sweep_tasks.settings_digest(description, Schedule(**{**vars(SCHEDULE), "steps": 5}), CPU),
        sweep_tasks.settings_digest(description, Schedule(**{**vars(SCHEDULE), "optimizer": "sgd"}), CPU),
        sweep_tasks.settings_digest({**description, "digest": "other text"}, SCHEDULE, CPU),
    ):
        assert load_finished(path, other) == {}


@pytest.mark.parametrize("start", sweep_tasks.STARTS)
def test_all_methods_start_alike_and_then_part(material: Material, start: str) -> None:
    bench = Workbench(material, Schedule(**{**vars(SCHEDULE), "start": start, "lr_warmup_steps": 0}), CPU)
    runs = [bench.run(Task(method, 1e-2, seed)) for seed in (0, 1) for method in SWEPT_METHODS]
    assert_same_start(runs, SCHEDULE.warmup_steps)
    first_seed = {run["method"]: run for run in runs if run["seed"] == 0}
    assert len({run["held_out_losses"][-1] for run in first_seed.values()}) == len(SWEPT_METHODS)
    for run in runs:
        # LoRA-Muon begins at B = 0, and counts the pairs that it can move in some directions only
        skips = 14 if run["method"] == "lora-muon" and start == "zero" else 0
        assert run["skipped_pairs"] == skips, run["method"]
    assert first_seed["lora"]["applied_steps"] == 0
    assert first_seed["reflora"]["applied_steps"] == SCHEDULE.steps - SCHEDULE.warmup_steps
    for run in (runs[0], runs[-1]):  # either start leaves the model as it was loaded
        assert run["held_out_losses"][0] == pytest.approx(_untouched_loss(material), rel=1e-5)
    assert runs[0]["start_digest"] != runs[-1]["start_digest"], "a seed must change factors and order"


def _untouched_loss(material: Material) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in material.held_out:  # one by one, without padding
            batch = {name: torch.tensor([ids]) for name, ids in example.items()}
            logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
            labels = batch["labels"][0, 1:]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += int((labels != IGNORE_INDEX).sum())
    return total / tokens


def test_a_planted_different_start_is_caught(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.run(Task("lora", 1e-2, 0))
    original = Workbench.reset

    def planted(self: Workbench, task: Task) -> torch.optim.Optimizer:
        optimizer = original(self, task)
        with torch.no_grad():  # B is zero, so the loss does not show it
            self.trained[0].mul_(1.001)
        return optimizer

    monkeypatch.setattr(Workbench, "reset", planted)
    with pytest.raises(AssertionError, match=r"reflora.*start_digest"):
        assert_same_start([plain, bench.run(Task("reflora", 1e-2, 0))], SCHEDULE.warmup_steps)


@pytest.mark.parametrize("key, index", [("held_out_losses", 0), ("train_losses", 2)])
def test_a_different_loss_before_the_method_acts_is_caught(bench: Workbench, key: str, index: int) -> None:
    plain = bench.run(Task("lora", 1e-2, 0))
    other = copy.deepcopy(plain)
    other["method"] = "reflora"
    assert_same_start([plain, other], SCHEDULE.warmup_steps)
    other[key][index] *= 1.01
    with pytest.raises(AssertionError, match=rf"reflora \(lr 0.01, seed 0\) differ in {key}"):
        assert_same_start([plain, other], SCHEDULE.warmup_steps)


def test_every_seed_sees_each_record_once_per_epoch(material: Material) -> None:
    steps = len(material.train) // 2
    orders = []
    for seed in (0, 1):
        batches = material.batches(seed, steps, 2, CPU)
        orders.append([tuple(row[row != material.pad_token_id].tolist()) for b in batches for row in b["input_ids"]])
        assert len(set(orders[-1])) == len({tuple(e["input_ids"]) for e in material.train})
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_logits_of_answers_alone_give_the_loss_of_all_logits(bench: Workbench, material: Material) -> None:
    for batch in material.batches(0, 3, 2, CPU):
        assert batch["shift_labels"].shape[1] < batch["labels"].shape[1] - 1  # prompts are left out
        whole = bench.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        torch.testing.assert_close(bench.model(**batch).loss, whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ["lora", "sgd"]}, "methods: 'sgd' is unknown; choose from lora"),
        ({"learning_rates": [0.0, 1e-3]}, "learning_rates=.*above 0"),
        ({"seeds": [1, 1]}, "seeds=.*only once"),
        ({"warmup_steps": 250}, "warmup_steps=250 must be .* below steps=250"),
        ({"warmup_steps": 0, "methods": ["lora", "reflora+moments"]}, "reflora.moments carries .* warmup_steps=0"),
        ({"optimizer": "sgd", "methods": ["reflora+moments"]}, "sgd.*reflora.moments"),
        ({"start": "ones"}, "--start ones is unknown; choose one of zero, drawn"),
        ({"workers": 0}, "--workers 0 must be positive"),
        ({"alphas": [2.0, -1.0]}, "alphas=.*above 0"),
        ({"start_scales": [0.1, 1.0]}, "needs --start drawn"),
        ({"only_tuned": True}, "needs --tuned_in"),
        ({"extend": True, "learning_rates": [1e-3]}, "extend=True needs a grid of two"),
        ({"optimizer": "sgd"}, "optimizer='sgd' does not go with lora-muon, lora-rite, reflora-s, lora-sb, lora-xs"),
        ({"optimizer": "adam", "methods": ["lora"]}, "--optimizer adam is unknown; choose one of adamw, sgd"),
        ({"eval_dataset": ["x.json"]}, "needs --dataset"),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convergence.Arguments(**changes)


def test_a_missing_model_and_a_launcher_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"max_length": 8, "max_eval_records": 1, "eval_fraction": 0.1, "cache_dir": tmp_path}
    with pytest.raises(ValueError, match=r"model='.*nowhere' is not a folder"):
        prepare(str(tmp_path / "nowhere"), [], [], **sizes)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT]
    assert "WORLD_SIZE=2" in (text := launch(ranks, timeout_s=300, expect_failure=True)) and "--workers" in text
