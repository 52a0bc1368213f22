"""Report of ``scaling.py``: measured scaling, the cost model against measurements, and its predictions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.reports.shared import source_line, table

_WAYS = {
    ("gather", "zero3"): "whole factors gathered",
    ("flat", "zero3"): "flat lora_A, ZeRO-3",
    ("flat", "fsdp2"): "flat lora_A, FSDP2",
    ("tall", "zero3"): "tall lora_A, ZeRO-3",
    ("tall", "fsdp2"): "tall lora_A, FSDP2",
    ("backward", "zero3"): "refactoring in backward",
}
_EVENTS = {
    "collective": "start of a collective",
    "wait": "wait for a core, per collective and rank without one",
    "hop_intra": "hop of a ring",
    "message_intra": "message of an exchange",
    "ring_byte_intra": "byte through a ring",
    "exchange_byte_intra": "byte of an exchange",
    "reduce_byte": "byte summed",
    "step": "step, beside all else",
    "exchanged": "step with an exchange, beside all else",
    "pair": "pair of factors",
    "piece": "piece packed",
    "packed": "element packed",
    "grain": "grain packed (elements that stay together)",
    "memory_byte": "byte read or written in products",
    "flop": "float64 operation of products",
    "solve_flop": "float64 operation of the solve",
}


def markdown(record: dict[str, Any]) -> str:
    """Return all tables of a record."""
    results = record["results"]
    parts = [
        source_line(record),
        _training_markdown(results["training"], results["cores"], record["arguments"]),
        *([_model_markdown(results["model"])] if results["model"] else []),
        predictions_markdown(results["predictions"]),
    ]
    return "\n\n".join(parts)


def _training_markdown(cells: Sequence[dict[str, Any]], cores: int | None, arguments: dict[str, Any]) -> str:
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell["scaling"] == "strong", cell["engine"], cell["ranks"])):
        plain, method = cell["variants"]["lora"], cell["variants"]["reflora"]
        report = cell["report"]
        calls = ", ".join(f"{count} {kind}" for kind, count in report["collectives_per_step"].items()) or "none"
        rows.append(
            [
                f"{cell['scaling']}, {cell['engine']}",
                str(cell["ranks"]),
                str(cell["batch_size"]),
                *(f"{variant['tokens_per_second']:,.0f}" for variant in (plain, method)),
                *(_quartiles(variant["training_step_ms"]) for variant in (plain, method)),
                *(_quartiles(variant["optimizer_step_ms"]) for variant in (plain, method)),
                f"{report['bytes_per_step']:,}",
                calls,
            ]
        )
    header = ["scaling, engine", "ranks", "sequences per rank", "tokens/s, LoRA", "RefLoRA", "training step ms, LoRA"]
    header += ["RefLoRA", "optimizer step ms, LoRA", "RefLoRA", "bytes sent per rank and step", "collectives"]
    size = f"`{arguments['shape']}`, r={arguments['lora_rank']}, {arguments['seq_len']} tokens per sequence"
    lines = ["### Measured scaling", "", f"{size}; medians, in brackets quartiles.{_cores_note(cells, cores)}", ""]
    return "\n".join([*lines, table(header, rows)])


def _cores_note(cells: Sequence[dict[str, Any]], cores: int | None) -> str:
    most = max(cell["ranks"] for cell in cells)
    if cores is None:
        return ""
    shared = f" Up to {most} ranks share {cores} CPU cores, so" if most > cores else f" All ranks share {cores} cores:"
    return (
        f"{shared} adding ranks adds little or no computing power here: compare LoRA with RefLoRA in a row, and do not "
        "read the rows as the scaling efficiency of either."
    )


def _quartiles(values: dict[str, float], factor: float = 1.0) -> str:
    median, low, high = (factor * values[name] for name in ("median", "q1", "q3"))
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def error_summary(points: Sequence[dict[str, Any]]) -> str:
    """Return the median and the largest error of the model on measured points, as text."""
    errors = [abs(point["relative_error"]) for point in points]
    return f"median {statistics.median(errors):.0%}, largest {max(errors):.0%}, {len(errors)} points"


def _model_markdown(model: dict[str, Any]) -> str:
    constants = [
        [label, f"{1e9 * model['constants'][name]:,.3g}"]
        for name, label in _EVENTS.items()
        if name in model["constants"]
    ]
    rows = [
        [
            point["kind"],
            str(point["ranks"]),
            point["size"],
            _quartiles(point["seconds"], 1e3),
            f"{1e3 * point['model_seconds']:.1f}",
            f"{point['relative_error']:+.0%}",
            "yes" if point["sent_bytes"] == point["predicted_bytes"] else "NO",
        ]
        for point in model["held_out"]
    ]
    header = [
        "what RefLoRA adds to a",
        "ranks",
        "of",
        "measured ms (quartiles)",
        "model ms",
        "error",
        "bytes as counted",
    ]
    return "\n".join(
        [
            "### Cost model against measurement",
            "",
            "Constants fitted to bare collectives, packing, steps on whole factors and the smallest sharded steps of "
            f"this machine (error of the model: {error_summary(model['fitted'])}):",
            "",
            table(["one", "nanoseconds"], constants),
            "",
            f"Held-out steps, of other sizes and r, which the fit has not seen ({error_summary(model['held_out'])}):",
            "",
            table(header, rows),
        ]
    )


def predictions_markdown(predictions: dict[str, Any]) -> str:
    """Return the predicted costs of every way, and the sources of the constants."""
    assumed = predictions["assumptions"]
    parts = [
        "### Predictions",
        "",
        "**Predicted, not measured.** No measured error bar covers these figures: the errors above are of the same "
        "model on another machine, and the constants of GPUs and links are published measurements of others (below). "
        "Kernel launches, and the solve's chain of small kernels, are left out of all ways alike. A gather is charged "
        "the fewest hops that any algorithm takes, an all-to-all one message to every GPU that gets something. A "
        "*flat* lora_A is stored as PEFT does and goes to its owner; a *tall* one stays, but for rows that are cut.",
        "",
        f"r={assumed['model_rank']}, all 7 linears, {assumed['tokens_per_gpu']:,} tokens per GPU and optimizer step in "
        f"{assumed['micro_batches']} backward passes. The training step takes 4 FLOP per weight and token at "
        f"{assumed['model_flops_utilization']:.0%} of {assumed['peak_flops'] / 1e12:.0f} TFLOP/s (assumed; "
        f"{_link(assumed['model_flops_utilization_source'])}).",
    ]
    for name, cluster in predictions["clusters"].items():
        rows = [row for row in predictions["rows"] if row["cluster"] == name]
        parts += ["", f"{cluster['title']}: added to the optimizer step, ms (share of the training step)", ""]
        parts.append(_prediction_table(rows, lambda row: f"{row['added_ms']:.3g} ({_share(row)})", with_step=True))
    first = next(iter(predictions["clusters"]))
    rows = [row for row in predictions["rows"] if row["cluster"] == first]
    for title, key in (
        ("Sent per GPU and optimizer step, MB", "sent_bytes"),
        ("Memory per GPU beyond LoRA, MB", "memory_bytes"),
    ):
        parts += ["", title, "", _prediction_table(rows, lambda row, key=key: f"{row[key] / 1e6:.3g}")]
    return "\n".join([*parts, "", *_sources(predictions["clusters"])])


def _share(row: dict[str, Any]) -> str:
    return f"{row['added_ms'] / row['training_step_ms']:.2%}"


def _prediction_table(rows: Sequence[dict[str, Any]], cell: Any, with_step: bool = False) -> str:
    ways = [way for way in _WAYS if any((row["way"], row["layout"]) == way for row in rows)]
    lines: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        fits = "" if row["base_fits"] else " (the base alone does not fit)"
        step = [f"{row['training_step_ms']:,.0f}"] if with_step else []
        line = lines.setdefault((row["model"], row["gpus"]), [row["model"], f"{row['gpus']:,}{fits}", *step])
        line.append(cell(row))
    header = ["model", "GPUs", *(["training step ms"] if with_step else []), *(_WAYS[way] for way in ways)]
    return table(header, lines.values())


def _sources(clusters: dict[str, Any]) -> list[str]:
    """Every constant once; a cluster after the first lists those in which it differs."""
    lines, shown = ["Constants of the predictions:"], []
    for cluster in clusters.values():
        rows = []
        for name, constant in cluster["constants"].items():
            if (name, constant) not in shown:
                shown.append((name, constant))
                source = f"{_link((constant['title'], constant['url']))}: {constant['published']}"
                rows.append([name, _unit(constant["seconds"], name), source, constant["derivation"]])
        lines += ["", cluster["title"], "", table(["one", "costs", "published", "derivation"], rows)]
    return lines


def _unit(seconds: float, name: str) -> str:
    rate = "flop" in name or "byte" in name
    return f"1 / ({1 / seconds / 1e9:,.4g} G per s)" if rate else f"{1e6 * seconds:.3g} us"


def _link(source: Sequence[str]) -> str:
    return f"[{source[0]}]({source[1]})"


def plot(record: dict[str, Any]) -> Any:
    """Plot tokens/s by ranks, the model against measurements, and predicted costs by GPUs."""
    from matplotlib.figure import Figure

    results = record["results"]
    models = list(dict.fromkeys(row["model"] for row in results["predictions"]["rows"]))
    columns = max(3, len(models))
    figure = Figure(figsize=(4.2 * columns, 8), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for axis, scaling in zip(axes[0], ("weak", "strong"), strict=False):
        _plot_scaling(axis, [cell for cell in results["training"] if cell["scaling"] == scaling], results["cores"])
        axis.set_title(f"{scaling} scaling, measured")
    if results["model"]:
        _plot_model(axes[0][2], results["model"])
    for axis in axes[0][3 if results["model"] else 2 :]:
        axis.set_axis_off()
    for axis, model in zip(axes[1], models, strict=False):
        _plot_predictions(axis, [row for row in results["predictions"]["rows"] if row["model"] == model])
        axis.set_title(f"{model}, predicted (solid InfiniBand, dashed Ethernet)", fontsize=9)
    axes[1][0].legend(fontsize=7)
    for axis in axes[1][len(models) :]:
        axis.set_axis_off()
    return figure


def _plot_scaling(axis: Any, cells: Sequence[dict[str, Any]], cores: int | None) -> None:
    for index, engine in enumerate(dict.fromkeys(cell["engine"] for cell in cells)):
        points = sorted((cell for cell in cells if cell["engine"] == engine), key=lambda cell: cell["ranks"])
        ranks = [cell["ranks"] for cell in points]
        for variant, style in (("lora", "--"), ("reflora", "-")):
            rates = [cell["variants"][variant]["tokens_per_second"] for cell in points]
            axis.plot(ranks, rates, style, color=f"C{index}", marker="o", label=f"{engine}, {variant}")
        ideal = [rates[0] * count / ranks[0] for count in ranks]
        axis.plot(ranks, ideal, ":", color=f"C{index}", label=f"{engine}, ideal")
    if cores is not None:
        axis.axvline(cores, color="gray", linewidth=0.8, label=f"{cores} CPU cores")
    axis.set(xlabel="ranks", ylabel="tokens/s", ylim=(0, None), xticks=sorted({cell["ranks"] for cell in cells}))
    axis.legend(fontsize=7)


def _plot_model(axis: Any, model: dict[str, Any]) -> None:
    for name, marker, filled in (("fitted", "o", "none"), ("held_out", "s", "C3")):
        measured = [1e3 * point["seconds"]["median"] for point in model[name]]
        predicted = [1e3 * point["model_seconds"] for point in model[name]]
        axis.scatter(
            measured, predicted, marker=marker, facecolors=filled, edgecolors="C3", label=name.replace("_", " ")
        )
    line = sorted(
        point["seconds"]["median"] * 1e3 for points in (model["fitted"], model["held_out"]) for point in points
    )
    axis.plot([line[0], line[-1]], [line[0], line[-1]], ":", color="gray")
    axis.set(
        xscale="log", yscale="log", xlabel="measured ms", ylabel="model ms", title="cost model against measurement"
    )
    axis.legend(fontsize=7)


def _plot_predictions(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for cluster, style in zip(dict.fromkeys(row["cluster"] for row in rows), ("-", "--"), strict=False):
        for index, (way, label) in enumerate(_WAYS.items()):
            points = [row for row in rows if row["cluster"] == cluster and (row["way"], row["layout"]) == way]
            gpus, added = [row["gpus"] for row in points], [row["added_ms"] for row in points]
            axis.plot(
                gpus,
                added,
                style,
                color=f"C{index}",
                marker=".",
                label=label.replace("`", "") if style == "-" else None,
            )
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="added to the optimizer step, ms")
