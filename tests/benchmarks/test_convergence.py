"""The convergence benchmark: the same start for all methods, sweeps that continue, statistics that are exact."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import convergence
from benchmarks.harness.names import ALL_METHODS
from benchmarks.reports.convergence import markdown, plot
from benchmarks.sweep import tasks as sweep_tasks
from benchmarks.sweep.data import Material, prepare
from benchmarks.sweep.runs import Workbench
from benchmarks.sweep.same_start import assert_same_start
from benchmarks.sweep.statistics import good_range, mean_and_sd, open_ends, paired, summarize
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


def test_a_grid_grows_where_the_best_rate_or_the_range_of_good_ones_is_at_its_end() -> None:
    def runs(losses: dict[float, float | None]) -> list[dict[str, Any]]:
        shared = {"method": "lora", "alpha": 2.0, "seed": 0, "held_out_steps": [0]}
        return [
            {**shared, "learning_rate": rate, "held_out_losses": [loss], "choosing_loss": loss, "train_losses": [loss]}
            for rate, loss in losses.items()
        ]

    assert open_ends(runs({1e-3: 3.0, 2e-3: 2.0, 4e-3: 3.0})) == []
    assert open_ends(runs({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0})) == [("lora", 2.0, 5e-4)]
    assert open_ends(runs({1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.01})) == [("lora", 2.0, 8e-3)]  # within 1%
    assert open_ends(runs({1e-3: None, 2e-3: None})) == [("lora", 2.0, 5e-4)]


def test_a_sweep_trains_beyond_its_grid_until_the_best_rate_is_inside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        SCRIPT,
        *options(model, tmp_path),
        "--methods",
        "lora",
        "--workers",
        "1",
        "--extend",
        "True",
        "--seeds",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "grown.json")])
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
        sweep_tasks.settings_digest({**description, "digest": "other text"}, SCHEDULE, CPU),
    ):
        assert load_finished(path, other) == {}


@pytest.mark.parametrize("start", sweep_tasks.STARTS)
def test_all_methods_start_alike_and_then_part(material: Material, start: str) -> None:
    bench = Workbench(material, Schedule(**{**vars(SCHEDULE), "start": start, "lr_warmup_steps": 0}), CPU)
    runs = [bench.run(Task(method, 1e-2, seed)) for seed in (0, 1) for method in ALL_METHODS]
    assert_same_start(runs, SCHEDULE.warmup_steps)
    first_seed = {run["method"]: run for run in runs if run["seed"] == 0}
    assert len({run["held_out_losses"][-1] for run in first_seed.values()}) == len(ALL_METHODS)
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


def test_mean_and_spread() -> None:
    assert mean_and_sd([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(math.sqrt(2))}
    assert mean_and_sd([1.0]) == {"mean": 1.0, "sd": 0.0}
    assert mean_and_sd([1.0, None]) == {"mean": None, "sd": None}


def test_the_range_within_one_percent_is_interpolated_in_log_lr() -> None:
    # 1% is reached half way down from 0.1 to 0.01, and a quarter of the way up from 0.1 to 1
    found = good_range([0.01, 0.1, 1.0], [1.02, 1.0, 1.04])
    assert found["low"] == pytest.approx(0.1 * 10**-0.5) and found["high"] == pytest.approx(0.1 * 10**0.25)
    assert found["factor"] == pytest.approx(10**0.75)
    assert not found["low_open"] and not found["high_open"]


def test_the_range_passes_grid_points_and_ends_at_the_grid_or_at_divergence() -> None:
    found = good_range([1.0, 2.0, 4.0, 8.0], [1.005, 1.0, 1.009, None])
    assert (found["low"], found["low_open"]) == (1.0, True)
    assert (found["high"], found["high_open"]) == (4.0, False)
    assert good_range([1.0, 2.0], [None, None])["factor"] is None
    # a second valley beyond a ridge is not part of the range
    assert good_range([1.0, 2.0, 4.0], [1.0, 1.02, 1.0])["high"] == pytest.approx(2**0.5)


def test_paired_differences_and_their_interval() -> None:
    found = paired([1.0, 2.0, 3.0], [0.5, 1.0, 1.5])
    assert found["differences"] == [0.5, 1.0, 1.5] and found["mean"] == 1.0
    assert found["standard_error"] == pytest.approx(0.5 / math.sqrt(3))
    assert found["interval"] == pytest.approx([1 - 4.303 * 0.5 / math.sqrt(3), 1 + 4.303 * 0.5 / math.sqrt(3)])
    assert paired([1.0], [0.5])["interval"] is None and paired([1.0, None], [0.5, 0.5])["mean"] is None


def made_up_runs(
    finals: dict[tuple[str, float], list[float | None]], *, alpha: float = 2.0, start_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Runs of two steps. The records that choose have the reported loss, and half a unit more."""
    return [
        {"method": method, "learning_rate": rate, "seed": seed, "alpha": alpha, "start_scale": start_scale}
        | {"held_out_steps": [0, 1, 2], "held_out_losses": [2.0, 1.6, final], "train_losses": [2.0, 1.5]}
        | {"choosing_loss": None if final is None else final + 0.5}
        for (method, rate), values in finals.items()
        for seed, final in enumerate(values)
    ]


MADE_UP: dict[tuple[str, float], list[float | None]] = {
    ("lora", 0.1): [1.0, 1.2],
    ("lora", 0.2): [0.9, 1.1],
    ("lora", 0.4): [0.5, None],  # one diverged seed rules a rate out
    ("reflora", 0.1): [1.5, 1.5],
    ("reflora", 0.2): [1.4, 1.4],
    ("reflora", 0.4): [0.8, 1.1],
}
STEP_MS = {"lora": {"median": 10.0}, "reflora": {"median": 12.5}}


def test_each_method_is_tuned_on_its_own_and_an_edge_is_said_to_be_one() -> None:
    results = summarize(made_up_runs(MADE_UP), STEP_MS)
    lora, reflora = results["methods"]["lora"], results["methods"]["reflora"]
    assert (lora["best_learning_rate"], lora["best_inside_grid"]) == (0.2, True)
    assert (reflora["best_learning_rate"], reflora["best_inside_grid"]) == (0.4, False)
    assert results["paired"]["reflora"]["differences"] == pytest.approx([-0.1, 0.0])
    assert lora["curves"]["held_out"][-1]["mean"] == pytest.approx(1.0)


def test_records_that_are_not_reported_choose_the_rate() -> None:
    runs = made_up_runs(MADE_UP)
    for run in runs:
        if run["method"] == "lora" and run["learning_rate"] == 0.1:
            run["choosing_loss"] = 0.1
    lora = summarize(runs, STEP_MS)["methods"]["lora"]
    assert (lora["best_learning_rate"], lora["mean"]) == (0.1, pytest.approx(1.1))


def test_loss_at_equal_time_and_steps_to_the_baseline_are_interpolated() -> None:
    results = summarize(made_up_runs(MADE_UP), STEP_MS)
    # plain LoRA's two steps take as long as 1.6 of RefLoRA's
    at_time = [1.6 + 0.6 * (final - 1.6) for final in (0.8, 1.1)]
    expected = [x - y for x, y in zip(at_time, (0.9, 1.1), strict=True)]
    assert results["paired_at_equal_time"]["reflora"]["differences"] == pytest.approx(expected)
    assert results["methods"]["lora"]["steps_to_baseline"] == pytest.approx(2.0)
    assert results["methods"]["reflora"]["steps_to_baseline"] == pytest.approx(1 + (1.6 - 1.0) / (1.6 - 0.95))


def test_alpha_is_tuned_with_the_rate() -> None:
    runs = made_up_runs(MADE_UP) + made_up_runs({("lora", 0.1): [0.7, 0.7], ("lora", 0.2): [0.8, 0.8]}, alpha=4.0)
    lora = summarize(runs, STEP_MS)["methods"]["lora"]
    assert (lora["alpha"], lora["best_learning_rate"], lora["mean"]) == (4.0, 0.1, pytest.approx(0.7))
    assert [(entry["alpha"], entry["best_learning_rate"]) for entry in lora["alphas"]] == [(2.0, 0.2), (4.0, 0.1)]


def test_regret_is_what_a_rate_of_another_sweep_loses() -> None:
    elsewhere = summarize(made_up_runs({**MADE_UP, ("lora", 0.1): [0.3, 0.3]}), STEP_MS)["methods"]
    results = summarize(made_up_runs(MADE_UP), STEP_MS, elsewhere)
    assert results["regret"]["lora"]["learning_rate"] == 0.1
    assert results["regret"]["lora"]["loss"]["differences"] == pytest.approx([0.1, 0.1])
    assert results["regret"]["reflora"]["loss"]["differences"] == [0.0, 0.0]
    assert summarize(made_up_runs(MADE_UP), STEP_MS, {"lora": elsewhere["lora"]})["regret"]["reflora"] is None


def test_scaled_starts_are_compared_with_the_start_as_drawn() -> None:
    one = {("lora", 0.2): [0.9, 1.1], ("reflora", 0.4): [0.8, 1.1]}
    scaled = made_up_runs({("lora", 0.2): [1.9, 2.2], ("reflora", 0.4): [0.8, 1.1]}, start_scale=0.1)
    results = summarize(made_up_runs(one) + scaled, STEP_MS)
    assert results["methods"]["lora"]["mean"] == pytest.approx(1.0)
    lora, reflora = results["start_scales"]["lora"], results["start_scales"]["reflora"]
    assert [entry["start_scale"] for entry in lora] == [0.1, 1.0]
    assert lora[0]["moved"]["differences"] == pytest.approx([1.0, 1.1])
    assert reflora[0]["moved"]["differences"] == [0.0, 0.0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ["lora", "sgd"]}, "methods: 'sgd' is unknown; choose from lora"),
        ({"learning_rates": [0.0, 1e-3]}, "learning_rates=.*above 0"),
        ({"seeds": [1, 1]}, "seeds=.*only once"),
        ({"warmup_steps": 250}, "warmup_steps=250 must be .* below steps=250"),
        ({"start": "ones"}, "--start ones is unknown; choose one of zero, drawn"),
        ({"workers": 0}, "--workers 0 must be positive"),
        ({"alphas": [2.0, -1.0]}, "alphas=.*above 0"),
        ({"start_scales": [0.1, 1.0]}, "needs --start drawn"),
        ({"only_tuned": True}, "needs --tuned_in"),
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
