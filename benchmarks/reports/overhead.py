"""Report of ``overhead.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.reports.shared import source_line, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 2**20
_PLAIN = ("lora", "lora-flat")
_TALL = " lora_A is stored tall, `[in, r]`."
_FLAT = " In rows that end with *-flat* it is stored as PEFT does; these are compared with their own plain LoRA."
_QUEUED = (
    " An optimizer step is waited for before and after; *queued* steps follow each other without waiting, each behind "
    "a copy of gradients."
)


def markdown(record: dict[str, Any]) -> str:
    """Return a table per r: times, what is added to plain LoRA, memory; then collectives and phases if measured."""
    arguments, results = record["arguments"], record["results"]
    shape = results["shape"]
    lines = [
        f"**{arguments['model']}**, {shape['num_layers']} layers (hidden {shape['hidden_size']}, "
        f"{shape['intermediate_size']}), engine {arguments['engine']}, {record['world_size']} rank(s). Medians "
        "(quartiles) of interleaved blocks; *added* is the difference of medians to plain LoRA, *ratio* their quotient."
        + _TALL * results.get("stored_tall", False)
        + _FLAT * arguments.get("flat", False)
        + _QUEUED * (arguments["scope"] == "step"),
    ]
    for run in results["runs"]:
        lines += ["", _title(run), "", _times_table(run), *_errors(run), *_collectives(run), *_phases(run)]
    if results["peak_resident_bytes"]:
        lines += ["", f"Peak resident set of the first rank: {results['peak_resident_bytes'] / _MIB:,.0f} MiB."]
    return "\n".join([*lines, "", source_line(record)])


def headline(record: dict[str, Any]) -> str:
    """Return what RefLoRA adds to the optimizer step, beside whole factors gathered first, as a sentence."""
    arguments, run = record["arguments"], record["results"]["runs"][0]
    reflora, gather = run["variants"]["reflora"], run["variants"]["gather-coalesced"]
    ranks, hardware = record["world_size"], record["hardware"]
    shared = arguments["backend"] == "gloo"
    flat = run["variants"].get("reflora-flat")
    stored = "" if flat is None else f"; with lora_A as PEFT stores it: {flat['added_step_ms']:.1f} ms more"
    model = (
        f"LLaMA {arguments['model'].upper()}" if arguments["model"][0].isdigit() else f"a {arguments['model']} LLaMA"
    )
    where = f"{ranks} ranks that share one {hardware} over gloo" if shared else f"{ranks} ranks, {hardware}"
    return (
        f"- {record['results']['shape']['num_layers']} layers of {model}, r = {run['lora_rank']}, "
        f"{arguments['engine']} on {where}: {reflora['added_step_ms']:.1f} ms more per optimizer "
        f"step, {reflora['report']['bytes_per_step'] / 1e6:.1f} MB sent per rank (whole factors gathered first: "
        f"{gather['added_step_ms']:.1f} ms more{stored})."
    )


def _title(run: dict[str, Any]) -> str:
    return f"r = {run['lora_rank']}: {run['num_pairs']} adapters, {run['adapter_parameters'] / 1e6:.1f} M parameters"


def _times_table(run: dict[str, Any]) -> str:
    first = run["variants"]["lora"]
    header = ["", "optimizer step, ms", "added, ms", "times RefLoRA's"]
    whole = "training_step_ms" if "training_step_ms" in first else "queued_step_ms"
    header += ["training step, ms" if whole == "training_step_ms" else "queued step, ms", "added, ms", "ratio"]
    sent = {name: figures["report"]["bytes_per_step"] for name, figures in run["variants"].items() if figures["report"]}
    if any(sent.values()):
        header.append("bytes sent per step and rank")
    if first["memory"]:
        header += ["held between steps, MiB", "peak of the optimizer step, MiB"]
    rows = []
    for name, figures in run["variants"].items():
        times, plain = figures.get("added_over_reflora"), name in _PLAIN
        row = [name, _quartiles(figures["step_ms"]), "" if plain else f"{figures['added_step_ms']:.2f}"]
        row.append("" if plain or times is None else f"{times:.2f}")
        row += [_quartiles(figures[whole]), "" if plain else f"{figures[f'added_{whole}']:.2f}"]
        row.append(f"{figures[f'{whole}_ratio']:.3f}")
        if any(sent.values()):
            row.append(f"{sent[name]:,}" if name in sent else "")
        if first["memory"]:
            row += [f"{figures['memory'][key] / _MIB:.1f}" for key in ("held_bytes", "step_peak_bytes")]
        rows.append(row)
    return table(header, rows)


def _quartiles(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def _errors(run: dict[str, Any]) -> list[str]:
    errors = ", ".join(f"{name} {error:.0e}" for name, error in run["largest_relative_error"].items())
    return ["", f"Refactored gradients agree, largest relative error: {errors}."] if errors else []


def _collectives(run: dict[str, Any]) -> list[str]:
    bare = run["bare_collectives"]
    if bare is None:
        return []
    calls = ", ".join(f"{call['kind']} of {call['payload_bytes']:,} bytes" for call in bare["calls"])
    text = (
        f"RefLoRA's collectives by themselves ({calls}): {_quartiles(bare['step_ms'])} ms; RefLoRA adds "
        f"{bare['added_over_bare']:.2f} times that."
    )
    if "added_step_ms" in bare:  # not in older records
        text += f" Issued before plain LoRA's update, they add {bare['added_step_ms']:.2f} ms to its optimizer step."
    return ["", text]


def _phases(run: dict[str, Any]) -> list[str]:
    phases = run["breakdown_ms"]
    if phases is None:
        return []
    lines = [
        "",
        "Phases of a RefLoRA step, ms, each waited for (rest: the update, and what lies between):",
        "",
        _phase_table(phases),
    ]
    flat = run.get("other_breakdowns_ms", {}).get("reflora-flat")
    return lines if flat is None else [*lines, "", "With lora_A as PEFT stores it:", "", _phase_table(flat)]


def _phase_table(phases: dict[str, dict[str, float]]) -> str:
    names = [name.replace("_", " ") for name in phases]
    return table(names, [[f"{spread['median']:.2f}" for spread in phases.values()]])


def plot(record: dict[str, Any]) -> Figure:
    """Plot what each variant adds to the optimizer step, by r, and the phases of a RefLoRA step if measured."""
    from matplotlib.figure import Figure

    runs = record["results"]["runs"]
    with_phases = [run for run in runs if run["breakdown_ms"]]
    figure = Figure(figsize=(10 if with_phases else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if with_phases else 1, squeeze=False)[0]
    _plot_added(axes[0], runs)
    if with_phases:
        _plot_phases(axes[1], with_phases)
    arguments = record["arguments"]
    figure.suptitle(
        f"{arguments['model']}, {arguments['engine']}, {record['world_size']} rank(s), {record['hardware']}"
    )
    return figure


def _plot_added(axes: Any, runs: list[dict[str, Any]]) -> None:
    names = [name for name in runs[0]["variants"] if name not in _PLAIN]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        places = [index + (number - (len(names) - 1) / 2) * width for index in range(len(runs))]
        axes.bar(places, [run["variants"][name]["added_step_ms"] for run in runs], width, label=name)
    axes.set_yscale("symlog", linthresh=0.1)  # noise can make a small difference negative
    axes.set_ylabel("added to the optimizer step (ms)")
    _label_ranks(axes, runs)
    axes.legend(ncols=2, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _plot_phases(axes: Any, runs: list[dict[str, Any]]) -> None:
    bottom = [0.0] * len(runs)
    for phase in (name for name in runs[0]["breakdown_ms"] if name != "rest"):
        heights = [run["breakdown_ms"][phase]["median"] for run in runs]
        axes.bar(range(len(runs)), heights, 0.6, bottom=bottom, label=phase.replace("_", " "))
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("phases of a RefLoRA step (ms)")
    _label_ranks(axes, runs)
    axes.legend(ncols=2, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _label_ranks(axes: Any, runs: list[dict[str, Any]]) -> None:
    axes.set_xticks(range(len(runs)), [f"r = {run['lora_rank']}" for run in runs])
    axes.grid(axis="y", alpha=0.3)
