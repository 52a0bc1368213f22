"""Plots of the loss, of one run and of several runs beside each other, and of what the method does in a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a compute node

from matplotlib import pyplot

from .recorder import METHOD_PLOT_FILE, PLOT_FILE

# panels of the method's plot: axis label, and the figures in it, which docs/settings.md explains
_PANELS = (
    ("change of the gradients", ("gradient_change",)),
    ("balance |A| / |B|", ("balance_min", "balance_median", "balance_max", "balance_after_median")),
    ("condition of the Grams", ("gram_condition_median", "gram_condition_max")),
    ("pairs skipped, share", ("skipped_share",)),
    ("ms per step", ("step_ms",)),
    ("bytes per step", ("bytes_per_step",)),
)
_LOGARITHMIC = ("balance |A| / |B|", "condition of the Grams")


def plot_run(metrics: dict[str, Any], output_dir: Path) -> Path | None:
    """Plot training and held-out loss by optimizer step. Return ``loss.png``'s path, or None if no loss was logged."""
    return plot_comparison([metrics], output_dir / PLOT_FILE)


def plot_method(metrics: dict[str, Any], output_dir: Path) -> Path | None:
    """Plot the method's figures by optimizer step. Return ``method.png``'s path, or None if none was logged."""
    path, points = output_dir / METHOD_PLOT_FILE, metrics["figures"]
    if not points:
        path.unlink(missing_ok=True)
        return None
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for axes, (label, names) in zip(panels.flat, _PANELS, strict=True):
        for name in names:
            found = [(point["step"], point[name]) for point in points if name in point]
            if found:
                axes.plot(*zip(*found, strict=True), marker=".", label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if label in _LOGARITHMIC and axes.lines:
            axes.set_yscale("log")
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def plot_comparison(runs: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Plot training loss (thin) and held-out loss (dots) of all runs, one colour per run.

    Returns:
        ``path``; None if no run logged a loss. In that case an earlier plot at ``path`` is removed.
    """
    if not any(run[name] for run in runs for name in ("train_loss", "held_out_loss")):
        path.unlink(missing_ok=True)
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, run in enumerate(runs):
        color = f"C{number}"
        for name, style in (("train_loss", {"alpha": 0.4}), ("held_out_loss", {"marker": "o"})):
            if run[name]:
                steps = [point["step"] for point in run[name]]
                losses = [point["loss"] for point in run[name]]
                label = f"{run['method']}, {name.removesuffix('_loss').replace('_', '-')}"
                marked = {"marker": "."} if len(steps) == 1 else {}  # a line through one point would not show
                axes.plot(steps, losses, color=color, label=label, **{**marked, **style})  # type: ignore[arg-type]
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
