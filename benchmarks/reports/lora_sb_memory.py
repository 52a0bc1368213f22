"""Report of ``lora_sb_memory.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.reports.shared import source_line, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 2**20


def markdown(record: dict[str, Any]) -> str:
    """Return a table of peak memory, whole and beyond the model, by variant and number of ranks."""
    arguments, results = record["arguments"], record["results"]
    rows = []
    for cell in results["cells"]:
        rows.append(
            [
                str(cell["ranks"]),
                cell["variant"],
                f"{cell['peak_bytes'] / _MIB:,.0f}",
                f"{cell['added_bytes'] / _MIB:,.0f}",
                f"{cell['seconds']:.1f}",
                "" if cell["energy"] is None else f"{cell['energy']:.6g}",
            ]
        )
    header = ["ranks", "", "peak per rank, MiB", "beyond the model, MiB", "s", "energy of the start"]
    return "\n".join(
        [
            f"**{arguments['shape']}**, {results['shape']['num_layers']} layers, r = {arguments['lora_rank']}, "
            f"{arguments['batches']} batches of {arguments['batch_size']} x {arguments['seq_len']} tokens per rank. "
            f"Gradients of all adapted weights take {results['gradient_bytes'] / _MIB:,.0f} MiB in float32. Peaks are "
            "of processes of their own (resident set on a CPU).",
            "",
            table(header, rows),
            "",
            source_line(record),
        ]
    )


def plot(record: dict[str, Any]) -> Figure:
    """Plot peak memory per rank, with one bar per variant and number of ranks."""
    from matplotlib.figure import Figure

    cells = record["results"]["cells"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        [f"{cell['variant']}, {cell['ranks']} rank(s)" for cell in cells], [c["added_bytes"] / _MIB for c in cells]
    )
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.invert_yaxis()
    axes.set_xlabel("peak memory per rank beyond the model, MiB")
    axes.set_title(f"{record['arguments']['shape']}, {record['hardware']}")
    return figure
