"""Statistics of a sweep: tuned rates, ranges of good ones, paired differences, where the grid has to grow."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.sweep.statistics import good_range, mean_and_sd, open_ends, paired, summarize


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
    at_rates = {entry["learning_rate"]: entry for entry in results["paired_at_rates"]["reflora"]}
    assert at_rates[0.4]["differences"] is None
    assert at_rates[0.1]["differences"] == pytest.approx([0.5, 0.3])
    assert at_rates[0.2]["differences"] == pytest.approx([0.5, 0.3])


def test_records_that_are_not_reported_choose_the_rate() -> None:
    runs = made_up_runs(MADE_UP)
    for run in runs:
        if run["method"] == "lora" and run["learning_rate"] == 0.1:
            run["choosing_loss"] = 0.1
    lora = summarize(runs, STEP_MS)["methods"]["lora"]
    assert (lora["best_learning_rate"], lora["mean"]) == (0.1, pytest.approx(1.1))


def test_with_the_halves_exchanged_the_reported_records_choose() -> None:
    reported = {("lora", 0.1): [1.0, 1.0], ("lora", 0.2): [0.9, 0.9]}
    reported |= {("reflora", 0.1): [0.7, 0.7], ("reflora", 0.2): [0.8, 0.8]}
    choosing = {("lora", 0.1): [0.5, 0.5], ("lora", 0.2): [0.6, 0.7]}
    choosing |= {("reflora", 0.1): [0.4, 0.45], ("reflora", 0.2): [0.3, 0.3]}
    runs = made_up_runs({**reported})
    for run in runs:
        run["choosing_loss"] = choosing[run["method"], run["learning_rate"]][run["seed"]]
    results = summarize(runs, STEP_MS)
    assert results["paired"]["reflora"]["differences"] == pytest.approx([-0.2, -0.2])
    assert results["paired_exchanged"]["reflora"]["differences"] == pytest.approx([-0.2, -0.25])


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
