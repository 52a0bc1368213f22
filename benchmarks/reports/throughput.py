"""Report of ``throughput.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.reports.shared import source_line, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIB, _MIB = 2**30, 2**20


def markdown(record: dict[str, Any]) -> str:
    """Return a table with one row per variant, and the formula of MFU."""
    arguments, results = record["arguments"], record["results"]
    shape = results["shape"]
    on_gpu = results["variants"]["lora"]["peak_allocated_bytes"] is not None
    rate = results["peak_flops_per_second"]
    lines = [
        f"**{arguments['model']}**, {shape['num_layers']} layers, r = {arguments['lora_rank']}, engine "
        f"{arguments['engine']}, {record['world_size']} device(s), {results['tokens_per_step_per_device']:,} tokens "
        f"per step and device in sequences of {arguments['seq_len']}"
        f"{', activations recomputed' if arguments['gradient_checkpointing'] else ''}.",
        "",
        _table(results, on_gpu),
        "",
        "Throughput beside lora: each block's divided by that of lora's block in the same round, median (quartiles) "
        "over the rounds; the quotient of two rows, medians of different rounds, may be another.",
        "",
        "MFU: (4 N + 6 N_a + 6 L h s) FLOPs per token, forward and activations' gradients of N frozen parameters, "
        f"adapters' N_a, causal attention; here {results['model_flops_per_token'] / 1e9:.2f} GFLOP per token, "
        + ("no peak rate is known for this device." if rate is None else f"of {rate / 1e12:g} TFLOP/s."),
    ]
    if results["peak_resident_bytes"]:
        lines += ["", f"Peak resident set of the first rank: {results['peak_resident_bytes'] / _GIB:.2f} GiB."]
    return "\n".join([*lines, "", source_line(record)])


def headline(record: dict[str, Any]) -> str:
    """Return throughput and memory of RefLoRA beside plain LoRA, and throughput of the loop, as a sentence."""
    arguments, results = record["arguments"], record["results"]
    variants = results["variants"]
    added = variants["reflora"]["peak_allocated_bytes"] - variants["lora"]["peak_allocated_bytes"]
    return (
        f"- LLaMA {arguments['model'].upper()}, r = {arguments['lora_rank']}, {record['world_size']} x "
        f"{record['hardware']}, {results['tokens_per_step_per_device']:,} tokens per step: "
        f"{variants['reflora']['throughput_ratio_by_block']['median']:.2%} of plain LoRA's throughput, "
        f"{added / _MIB:.1f} MiB more memory (the paper's formula in a loop over adapters: "
        f"{variants['loop']['throughput_ratio_by_block']['median']:.2%})."
    )


def _table(results: dict[str, Any], on_gpu: bool) -> str:
    header = ["", "step, ms (quartiles)", "tokens/s per device", "MFU", "throughput beside lora"]
    header += ["peak memory, GiB", "added, MiB"] if on_gpu else []
    plain_peak = results["variants"]["lora"]["peak_allocated_bytes"]
    rows = []
    for name, figures in results["variants"].items():
        step, mfu, ratios = figures["step_ms"], figures["mfu"], figures["throughput_ratio_by_block"]
        row = [
            name,
            f"{step['median']:.1f} ({step['q1']:.1f} to {step['q3']:.1f})",
            f"{figures['tokens_per_second_per_device']:,.0f}",
            "" if mfu is None else f"{mfu:.1%}",
            f"{ratios['median']:.2%}",
        ]
        if name != "lora":
            row[-1] += f" ({ratios['q1']:.2%} to {ratios['q3']:.2%})"
        if on_gpu:
            peak = figures["peak_allocated_bytes"]
            row += [f"{peak / _GIB:.3f}", f"{(peak - plain_peak) / _MIB:.1f}"]
        rows.append(row)
    return table(header, rows)


def plot(record: dict[str, Any]) -> Figure:
    """Plot tokens per second and device, with one bar per variant."""
    from matplotlib.figure import Figure

    arguments, variants = record["arguments"], record["results"]["variants"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(variants), [figures["tokens_per_second_per_device"] for figures in variants.values()])
    ratios = [figures["throughput_ratio_by_block"]["median"] for figures in variants.values()]
    axes.bar_label(bars, [f"{ratio:.1%}" for ratio in ratios])
    axes.tick_params(axis="x", rotation=20)  # names are wider than bars
    axes.set_xlabel("above the bars: throughput beside lora's, median over rounds")
    axes.set_ylabel("tokens/s per device")
    axes.grid(axis="y", alpha=0.3)
    setting = f"{arguments['model']}, {arguments['engine']}, {record['world_size']} device(s)"
    axes.set_title(f"{setting}, {record['hardware']}")
    return figure
