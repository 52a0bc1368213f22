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


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a sweep's results from its runs, one per method, learning rate and seed (see ``Workbench.run``)."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    tuned = {method: _tune([run for run in runs if run["method"] == method]) for method in methods}
    baseline = "lora" if "lora" in methods else methods[0]
    finals = {method: _at_best(tuned[method], "final_loss") for method in methods}
    return {
        "methods": tuned,
        "baseline": baseline,
        "paired": {method: paired(finals[method], finals[baseline]) for method in methods if method != baseline},
    }


def _at_best(tuned: dict[str, Any], key: str) -> list[float | None]:
    return tuned["sweep"][tuned["learning_rates"].index(tuned["best_learning_rate"])][key]


def _tune(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one method's final held-out loss at every learning rate, its best rate, and the curves there."""
    rates = sorted({run["learning_rate"] for run in runs})
    by_rate = [sorted((r for r in runs if r["learning_rate"] == rate), key=lambda r: r["seed"]) for rate in rates]
    sweep: list[dict[str, Any]] = []
    for at_rate in by_rate:
        final = [run["held_out_losses"][-1] for run in at_rate]
        sweep.append({"final_loss": final, **mean_and_sd(final)})
    means = [entry["mean"] for entry in sweep]
    best = min(range(len(rates)), key=lambda i: math.inf if means[i] is None else means[i])
    per_seed = zip(*(entry["final_loss"] for entry in sweep), strict=True)
    return {
        "learning_rates": rates,
        "seeds": [run["seed"] for run in by_rate[best]],
        "sweep": sweep,
        "best_learning_rate": rates[best],
        "best_inside_grid": 0 < best < len(rates) - 1,
        "good_range": good_range(rates, means),
        "good_factor_per_seed": [good_range(rates, losses)["factor"] for losses in per_seed],
        "curves": _curves(by_rate[best]),
    }


def _curves(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds of held-out and training loss, by step."""

    def over_seeds(key: str) -> list[dict[str, float | None]]:
        return [mean_and_sd(values) for values in zip(*(run[key] for run in runs), strict=True)]

    return {
        "held_out_steps": runs[0]["held_out_steps"],
        "held_out": over_seeds("held_out_losses"),
        "train": over_seeds("train_losses"),
    }
