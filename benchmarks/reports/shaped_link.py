"""Report of ``shaped_link.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.reports.shared import source_line, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXCHANGE = ("gather", "exchange")


def markdown(record: dict[str, Any]) -> str:
    """Return a table by link and way: the step, its phases, and the time of the bytes at the link's rate."""
    arguments, results = record["arguments"], record["results"]
    errors = [cell["largest_relative_error"] for cell in results["cells"] if cell["largest_relative_error"] is not None]
    header = [
        "link",
        "sent",
        "optimizer step, ms",
        "plain LoRA's, ms",
        "gather or exchange, ms",
        "all-reduce of Grams, ms",
    ]
    header += ["all else, ms", "bytes per step and rank", "bytes / rate, ms"]
    return "\n".join(
        [
            f"**{arguments['model']}**, r = {results['lora_rank']}: {results['num_pairs']} adapters, "
            f"{results['adapter_parameters'] / 1e6:.1f} M parameters; FSDP2, one rank on each of two hosts. Medians "
            "(quartiles) of interleaved blocks. Phases are the first rank's, medians of steps of their own; packing "
            "counts as the exchange that it is for, waiting for the other rank at the end as *all else*.",
            "",
            table(header, [_row(cell) for cell in results["cells"]]),
            "",
            "Refactored gradients agree with those of gathered factors on every link, largest relative error "
            f"{max(errors):.0e}.",
            "",
            source_line(record),
        ]
    )


def headline(record: dict[str, Any]) -> str:
    """Return the optimizer step on the slowest link by way, as a sentence."""
    results = record["results"]
    slowest = min(cell["mbit"] for cell in results["cells"] if cell["mbit"])
    cells = {cell["way"]: cell for cell in results["cells"] if cell["mbit"] == slowest}
    steps = {way: cell["step_ms"]["median"] for way, cell in cells.items()}
    return (
        f"- {results['num_pairs']} adapters, r = {results['lora_rank']}, FSDP2, two network namespaces of a "
        f"machine as hosts, link of {link(slowest)}: an optimizer step takes {steps['Grams alone']:.0f} ms, "
        f"plain LoRA's {cells['Grams alone']['plain_step_ms']['median']:.0f} (lora_A as PEFT stores it: "
        f"{steps['flat lora_A, Grams']:.0f}; whole factors gathered first: {steps['whole factors']:.0f})."
    )


def _row(cell: dict[str, Any]) -> list[str]:
    step, phases = cell["step_ms"], split(cell)
    return [
        link(cell["mbit"]),
        cell["way"],
        f"{step['median']:.1f} ({step['q1']:.1f} to {step['q3']:.1f})",
        f"{cell['plain_step_ms']['median']:.1f}",
        *(f"{milliseconds:.1f}" for milliseconds in phases),
        f"{cell['bytes_per_step']:,}",
        "" if cell["link_ms"] is None else f"{cell['link_ms']:.1f}",
    ]


def split(cell: dict[str, Any]) -> tuple[float, float, float]:
    """Return milliseconds of gathering or exchanging, of the Gram matrices' all-reduce, and of all else."""
    medians = {phase: spread["median"] for phase, spread in cell["phases_ms"].items()}
    exchange = sum(medians.get(phase, 0.0) for phase in _EXCHANGE)
    reduction = medians.get("all_reduce", 0.0)
    return exchange, reduction, sum(medians.values()) - exchange - reduction


def link(mbit: int) -> str:
    """Return the name of a link by its rate."""
    if not mbit:
        return "unshaped"
    return f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit} Mbit/s"


def plot(record: dict[str, Any]) -> Figure:
    """Plot the parts of a step as stacked bars, one panel per link."""
    from matplotlib.figure import Figure

    cells = record["results"]["cells"]
    rates = list(dict.fromkeys(cell["mbit"] for cell in cells))
    figure = Figure(figsize=(3.6 * len(rates), 4), layout="constrained")
    for axes, mbit in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates, strict=True):
        of_link = [cell for cell in cells if cell["mbit"] == mbit]
        bottom = [0.0] * len(of_link)
        parts = zip(*(split(cell) for cell in of_link), strict=True)
        for label, heights in zip(("gather or exchange", "all-reduce of Grams", "all else"), parts, strict=True):
            axes.bar([cell["way"].replace(", ", ",\n") for cell in of_link], heights, 0.6, bottom=bottom, label=label)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_title(link(mbit))
        axes.set_ylabel("optimizer step (ms)")
        axes.tick_params(axis="x", labelsize="small")
        axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    return figure
