"""Plots of the loss: of one run, and of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a compute node

from matplotlib import pyplot

PLOT_FILE = "loss.png"


def plot_run(metrics: dict[str, Any], output_dir: Path) -> Path | None:
    """Plot training and held-out loss by optimizer step. Return ``loss.png``'s path, or None if no loss was logged."""
    return plot_comparison([metrics], output_dir / PLOT_FILE)


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
