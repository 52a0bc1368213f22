"""Plots of the loss: of one run, and of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a compute node

from matplotlib import pyplot

PLOT_FILE = "loss.png"


def plot_run(metrics: dict[str, Any], output_dir: Path) -> Path:
    """Plot training and held-out loss by optimizer step, and return the path of ``loss.png``."""
    return plot_comparison([metrics], output_dir / PLOT_FILE)


def plot_comparison(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Plot training loss (thin) and held-out loss (dots) of all runs, one colour per run. Return ``path``."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, run in enumerate(runs):
        color = f"C{number}"
        for name, style in (("train_loss", {"alpha": 0.4}), ("held_out_loss", {"marker": "o"})):
            if run[name]:
                steps = [point["step"] for point in run[name]]
                losses = [point["loss"] for point in run[name]]
                label = f"{run['method']}, {name.removesuffix('_loss').replace('_', '-')}"
                axes.plot(steps, losses, color=color, label=label, **style)  # type: ignore[arg-type]
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
