"""Table and plot of ``lora_sb_memory.py``'s records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.reports.shared import source_line, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 2**20


def markdown(record: dict[str, Any]) -> str:
    """One row per variant and number of ranks; what the initialization adds to training's peak."""
    arguments, results = record["arguments"], record["results"]
    rows = []
    for cell in results["cells"]:
        added = (cell["peak_bytes"] - _training_peak(results, cell["ranks"])) / _MIB
        rows.append(
            [
                str(cell["ranks"]),
                cell["variant"],
                f"{cell['peak_bytes'] / _MIB:,.0f}",
                "" if cell["variant"] == "training" else f"{added:+,.0f}",
                f"{cell['seconds']:.1f}",
                "" if cell["energy"] is None else f"{cell['energy']:.6g}",
            ]
        )
    header = ["ranks", "", "peak per rank, MiB", "beside training", "s", "energy of the start"]
    return "\n".join(
        [
            f"**{arguments['shape']}**, {results['shape']['num_layers']} layers, r = {arguments['lora_rank']}, DDP, "
            f"{arguments['batches']} batches of {arguments['batch_size']} x {arguments['seq_len']} tokens per rank. "
            f"Gradients of all adapted weights take {results['gradient_bytes'] / _MIB:,.0f} MiB in float32. Peaks are "
            "of processes of their own (resident set on a CPU).",
            "",
            table(header, rows),
            "",
            source_line(record),
        ]
    )


def _training_peak(results: dict[str, Any], ranks: int) -> int:
    return next(c["peak_bytes"] for c in results["cells"] if c["variant"] == "training" and c["ranks"] == ranks)


def plot(record: dict[str, Any]) -> Figure:
    """Peak memory per rank, one bar per variant and number of ranks."""
    from matplotlib.figure import Figure

    cells = record["results"]["cells"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        [f"{cell['variant']}, {cell['ranks']} rank(s)" for cell in cells], [c["peak_bytes"] / _MIB for c in cells]
    )
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.invert_yaxis()
    axes.set_xlabel("peak memory per rank, MiB")
    axes.set_title(f"{record['arguments']['shape']}, {record['hardware']}")
    return figure
