"""Statistics of a sweep: tuned losses, ranges of good learning rates, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

RANGE_TOLERANCE = 0.01  # a learning rate is good if its loss is within this share of the best
# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom. Beyond 30 the last one is used, so the
# interval is a little too wide.
# fmt: off
_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


def mean_and_sd(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and sample standard deviation. Both are None if a run diverged (None among the values)."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return {"mean": None, "sd": None}
    return {"mean": statistics.fmean(finite), "sd": statistics.stdev(finite) if len(finite) > 1 else 0.0}


def good_range(learning_rates: Sequence[float], losses: Sequence[float | None]) -> dict[str, Any]:
    """Return the range of learning rates around the best whose loss is at most RANGE_TOLERANCE above the best loss.

    The loss is interpolated linearly in the logarithm of the learning rate. If the range reaches an end of the grid,
    that end is open, and the range is at least that wide.

    Args:
        learning_rates: ascending.
        losses: one loss for each rate; None if training diverged.

    Returns:
        ``low``, ``high``, ``factor`` (high / low), ``low_open``, ``high_open``; all None if every rate diverged.
    """
    values = [math.inf if loss is None else loss for loss in losses]
    best = min(range(len(values)), key=values.__getitem__)
    if math.isinf(values[best]):
        return dict.fromkeys(("low", "high", "factor", "low_open", "high_open"))
    limit = values[best] * (1 + RANGE_TOLERANCE)
    low, low_open = _crossing(learning_rates, values, best, limit, direction=-1)
    high, high_open = _crossing(learning_rates, values, best, limit, direction=1)
    return {"low": low, "high": high, "factor": high / low, "low_open": low_open, "high_open": high_open}


def _crossing(
    rates: Sequence[float], losses: Sequence[float], start: int, limit: float, direction: int
) -> tuple[float, bool]:
    """Return where the loss first exceeds the limit on the way from ``start``, or the grid's end and True."""
    inside = start
    while 0 <= inside + direction < len(rates):
        outside = inside + direction
        if losses[outside] > limit:
            # the way to a diverged neighbour is unknown, so the range ends at the last good rate
            share = (limit - losses[inside]) / (losses[outside] - losses[inside])
            return rates[inside] * (rates[outside] / rates[inside]) ** share, False
        inside = outside
    return rates[inside], True


def paired(values: Sequence[float | None], baseline: Sequence[float | None]) -> dict[str, Any]:
    """Return the differences ``values - baseline`` by seed, their mean, its standard error and 95% t interval.

    Entries are None if a run diverged. Error and interval are also None for a single seed.
    """
    if any(x is None for x in (*values, *baseline)):
        return {"differences": None, "mean": None, "standard_error": None, "interval": None}
    differences = [x - y for x, y in zip(values, baseline, strict=True)]  # type: ignore[operator]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return {"differences": differences, "mean": mean, "standard_error": None, "interval": None}
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = _T_QUANTILES[min(len(differences) - 1, len(_T_QUANTILES)) - 1] * error
    return {"differences": differences, "mean": mean, "standard_error": error, "interval": [mean - reach, mean + reach]}


def summarize(
    runs: Sequence[dict[str, Any]],
    step_ms: dict[str, dict[str, float]],
    tuned_elsewhere: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a sweep's results from its runs (see ``Workbench.run``).

    Args:
        runs: every combination of method, learning rate, alpha and scale of the start has the same seeds.
        step_ms: milliseconds of a training step by method, with a ``median``.
        tuned_elsewhere: by method, its entry in ``methods`` of another sweep's results, whose learning rates are
            compared with those here.
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    drawn_alike = [run for run in runs if run["start_scale"] == 1.0]
    tuned = {method: _tune([run for run in drawn_alike if run["method"] == method]) for method in methods}
    baseline = "lora" if "lora" in methods else methods[0]
    finals = {method: tuned[method].pop("finals") for method in methods}
    best_runs = {method: tuned[method].pop("best_runs") for method in methods}
    milliseconds = max(best_runs[baseline][0]["held_out_steps"]) * step_ms[baseline]["median"]
    at_time = {
        method: [_at_step(run, milliseconds / step_ms[method]["median"]) for run in best_runs[method]]
        for method in methods
    }
    goal = tuned[baseline]["curves"]["held_out"][-1]["mean"]
    for entry in tuned.values():
        entry["steps_to_baseline"] = _first_step(entry["curves"], goal)
    others = [method for method in methods if method != baseline]
    results = {
        "methods": tuned,
        "baseline": baseline,
        "paired": {method: paired(finals[method], finals[baseline]) for method in others},
        "paired_exchanged": _paired_exchanged(drawn_alike, baseline, others),
        "paired_at_equal_time": {method: paired(at_time[method], finals[baseline]) for method in others},
        "paired_at_rates": {method: _at_same_rates(tuned[method], tuned[baseline]) for method in others},
    }
    if tuned_elsewhere:
        results["regret"] = {method: _regret(tuned[method], tuned_elsewhere.get(method)) for method in methods}
    if len(drawn_alike) < len(runs):
        results["start_scales"] = {method: _scaled([r for r in runs if r["method"] == method]) for method in methods}
    return results


def _tune(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one method's result at the alpha that its choosing loss prefers, and one line for each other alpha."""
    by_alpha = [
        _tune_rate([run for run in runs if run["alpha"] == alpha]) for alpha in sorted({r["alpha"] for r in runs})
    ]
    best = min(by_alpha, key=lambda tuned: _or_infinite(tuned["choosing"]))
    keys = ("alpha", "best_learning_rate", "choosing", "mean", "sd")
    return {**best, "alphas": [{key: tuned[key] for key in keys} for tuned in by_alpha]}


def _tune_rate(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one method's reported loss at every learning rate, the chosen rate, and the curves there.

    ``finals`` and ``best_runs`` (by seed, at the chosen rate) are for the comparison with other methods.
    """
    rates = sorted({run["learning_rate"] for run in runs})
    by_rate = [sorted((r for r in runs if r["learning_rate"] == rate), key=lambda r: r["seed"]) for rate in rates]
    sweep: list[dict[str, Any]] = []
    for at_rate in by_rate:
        final = [run["held_out_losses"][-1] for run in at_rate]
        choosing = mean_and_sd([run["choosing_loss"] for run in at_rate])["mean"]
        sweep.append({"final_loss": final, "choosing": choosing, **mean_and_sd(final)})
    means = [entry["mean"] for entry in sweep]
    best = min(range(len(rates)), key=lambda i: _or_infinite(sweep[i]["choosing"]))
    per_seed = zip(*(entry["final_loss"] for entry in sweep), strict=True)
    return {
        "alpha": runs[0]["alpha"],
        "learning_rates": rates,
        "seeds": [run["seed"] for run in by_rate[best]],
        "sweep": sweep,
        "best_learning_rate": rates[best],
        "best_inside_grid": 0 < best < len(rates) - 1,
        "choosing": sweep[best]["choosing"],
        "mean": sweep[best]["mean"],
        "sd": sweep[best]["sd"],
        "good_range": good_range(rates, means),
        "good_factor_per_seed": [good_range(rates, losses)["factor"] for losses in per_seed],
        "curves": _curves(by_rate[best]),
        "finals": sweep[best]["final_loss"],
        "best_runs": by_rate[best],
    }


def open_ends(runs: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Return where the grid has to grow for the best rate, and the range of good rates around it, to lie inside it.

    Args:
        runs: every combination of method, learning rate and alpha has the same seeds; one scale of the start.

    Returns:
        Method, alpha, and the rate beyond an end of the grid, by the ratio of the two rates at that end.
    """
    grown = []
    for method, alpha in dict.fromkeys((run["method"], run["alpha"]) for run in runs):
        tuned = _tune_rate([run for run in runs if (run["method"], run["alpha"]) == (method, alpha)])
        rates, found, chosen = tuned["learning_rates"], tuned["good_range"], tuned["best_learning_rate"]
        if len(rates) < 2:
            continue
        if found["low_open"] or chosen == rates[0]:  # as when every rate diverges
            grown.append((method, alpha, _rounded(rates[0] * rates[0] / rates[1])))
        if found["high_open"] or chosen == rates[-1]:
            grown.append((method, alpha, _rounded(rates[-1] * rates[-1] / rates[-2])))
    return grown


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _paired_exchanged(
    runs: Sequence[dict[str, Any]], baseline: str, others: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return what ``paired`` would be, had the reported records chosen the rate, and the others been reported."""
    exchanged = [
        {**run, "choosing_loss": run["held_out_losses"][-1], "held_out_losses": [run["choosing_loss"]]} for run in runs
    ]
    finals = {
        method: _tune([run for run in exchanged if run["method"] == method])["finals"] for method in (baseline, *others)
    }
    return {method: paired(finals[method], finals[baseline]) for method in others}


def _at_same_rates(tuned: dict[str, Any], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one method's differences from the baseline at every learning rate that both have, each at its alpha."""
    known = dict(zip(baseline["learning_rates"], baseline["sweep"], strict=True))
    return [
        {"learning_rate": rate, **paired(entry["final_loss"], known[rate]["final_loss"])}
        for rate, entry in zip(tuned["learning_rates"], tuned["sweep"], strict=True)
        if rate in known
    ]


def _at_step(run: dict[str, Any], step: float) -> float | None:
    """Return a run's held-out loss at a step, between two evaluations on the line between them; at most its last."""
    steps, losses = run["held_out_steps"], run["held_out_losses"]
    if step >= steps[-1]:
        return losses[-1]
    after = next(index for index, known in enumerate(steps) if known > step)
    low, high = losses[after - 1], losses[after]
    if low is None or high is None:
        return None
    return low + (high - low) * (step - steps[after - 1]) / (steps[after] - steps[after - 1])


def _first_step(curves: dict[str, Any], goal: float | None) -> float | None:
    """Return the step at which the mean curve first reaches a loss, between two evaluations; None if it does not."""
    steps, means = curves["held_out_steps"], [_or_infinite(entry["mean"]) for entry in curves["held_out"]]
    if goal is None:
        return None
    for index, mean in enumerate(means):
        if mean <= goal:
            if index == 0 or math.isinf(means[index - 1]):
                return float(steps[index])
            share = (means[index - 1] - goal) / (means[index - 1] - mean)
            return float(steps[index - 1] + share * (steps[index] - steps[index - 1]))
    return None


def _regret(tuned: dict[str, Any], elsewhere: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the rate of another sweep loses beside the rate chosen here, seed by seed; None if it was not run."""
    if elsewhere is None:
        return None
    same_alpha = [entry for entry in elsewhere["alphas"] if entry["alpha"] == tuned["alpha"]]
    if not same_alpha or same_alpha[0]["best_learning_rate"] not in tuned["learning_rates"]:
        return None
    rate = same_alpha[0]["best_learning_rate"]
    here, there = (
        tuned["sweep"][tuned["learning_rates"].index(value)]["final_loss"]
        for value in (tuned["best_learning_rate"], rate)
    )
    return {"learning_rate": rate, **mean_and_sd(there), "loss": paired(there, here)}


def _scaled(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one method's loss from scaled starts, at the rate and alpha that it has in every one of them."""
    by_scale: dict[float, list[float | None]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        by_scale.setdefault(run["start_scale"], []).append(run["held_out_losses"][-1])
    return [
        {"start_scale": scale, "final_loss": losses, **mean_and_sd(losses), "moved": paired(losses, by_scale[1.0])}
        for scale, losses in sorted(by_scale.items())
    ]


def _curves(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds of held-out and training loss, by step."""

    def over_seeds(key: str) -> list[dict[str, float | None]]:
        return [mean_and_sd(values) for values in zip(*(run[key] for run in runs), strict=True)]

    return {
        "held_out_steps": runs[0]["held_out_steps"],
        "held_out": over_seeds("held_out_losses"),
        "train": over_seeds("train_losses"),
    }
