"""Report of ``matrix_factorization.py``: losses at the paper's learning rates and at each method's best rate."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.reports.shared import source_line, table

CEILING = 1e6  # a diverging curve is drawn up to here
COLOURS = {"lora": "C0", "scaled-gd": "C2", "reflora": "C3"}
PAPER_RATES = ("0.01", "0.03")


def markdown(record: dict[str, Any]) -> str:
    """Return one table per problem, the checks, and the source of the figures."""
    arguments = record["arguments"]
    lines = [
        f"Matrix factorization, {arguments['size']} x {arguments['size']}, r = {arguments['lora_rank']}, "
        f"{arguments['iterations']} iterations of plain gradient descent, {len(arguments['seeds'])} seeds. Cells: "
        "median loss at the end (quartiles), and the median number of iterations to "
        f"{arguments['target']:g} of the first loss.",
    ]
    for problem in record["results"]["problems"]:
        lines += ["", _title(problem), "", _problem_table(problem)]
    checks = record["results"]["checks"]
    drift = ", ".join(f"{method} {value:.1e}" for method, value in checks["product_drift"].items())
    lines += [
        "",
        f"Checked before: reflora's step is the plain method's to {checks['reference_error']:.1e}; started from "
        f"another factorization of the same product, the products differ after 10 steps by {drift}.",
        "",
        source_line(record),
    ]
    return "\n".join(lines)


def _title(problem: dict[str, Any]) -> str:
    return (
        f"**{problem['name']}**: condition number {problem['condition_number']:g}, A starts as noise of "
        f"{problem['start_std_a']:g}, B of {problem['start_std_b']:g}"
    )


def _problem_table(problem: dict[str, Any]) -> str:
    rows = []
    for method, result in problem["methods"].items():
        best = f"{result['best_learning_rate']:g}"
        edge = "" if result["best_inside_grid"] else ", at the grid's edge"
        cells = [_cell(result["rates"][rate]) for rate in (*PAPER_RATES, best)]
        cells[-1] = f"lr {best}{edge}: {cells[-1]}"
        rows.append([method, *cells])
    return table(["", *(f"lr {rate}" for rate in PAPER_RATES), "own best lr"], rows)


def _cell(entry: dict[str, Any]) -> str:
    loss, steps = entry["final_loss"], entry["steps_to_target"]
    if loss["median"] is None:
        return f"diverges ({entry['diverged_seeds']} of {len(steps)} seeds)"
    spread = " to ".join(_number(loss[name]) for name in ("q1", "q3"))
    median = statistics.median_low([float("inf") if s is None else s for s in steps])
    reached = "not reached" if median == float("inf") else f"{median:.0f} it."
    diverged = f", {entry['diverged_seeds']} of {len(steps)} diverge" if entry["diverged_seeds"] else ""
    return f"{_number(loss['median'])} ({spread}), {reached}{diverged}"


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.2g}"


def plot(record: dict[str, Any]) -> Any:
    """Plot loss by iteration, one panel per problem: at the paper's rates, and dotted at each method's best."""
    from matplotlib.figure import Figure

    problems = record["results"]["problems"]
    figure = Figure(figsize=(5 * len(problems), 4.2), layout="constrained")
    for axes, problem in zip(figure.subplots(1, len(problems), sharey=True, squeeze=False)[0], problems, strict=True):
        for method, result in problem["methods"].items():
            best = f"{result['best_learning_rate']:g}"
            for rate, style in zip((*PAPER_RATES, best), ("-", "--", ":"), strict=True):
                label = f"{method}, lr {rate}{' (best)' if style == ':' else ''}"
                _draw(axes, result["rates"][rate]["losses"], color=COLOURS[method], linestyle=style, label=label)
        axes.set(title=problem["name"], xlabel="iteration", yscale="log", ylim=(1e-6, 1e5))
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("loss, median and quartiles over seeds")
    return figure


def _draw(axes: Any, curves: dict[str, list[float | None]], **style: Any) -> None:
    """Draw a median with its quartiles shaded. Diverging curves leave through the top."""
    low, median, high = (
        [CEILING if x is None else min(x, CEILING) for x in curves[name]] for name in ("q1", "median", "q3")
    )
    axes.plot(median, **style)
    axes.fill_between(range(len(median)), low, high, color=style["color"], alpha=0.15, linewidth=0)
