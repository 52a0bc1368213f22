"""Report of ``convergence.py``: tuned losses, the whole sweep, paired differences, curves."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.names import MOMENTS
from benchmarks.reports.shared import source_line, table

COLOURS = {
    "lora": "C0",
    "reflora": "C3",
    "reflora+moments": "black",
    "reflora-s": "C1",
    "scaled-gd": "C2",
    "lora-pro": "C4",
    "lora-rite": "C5",
    "balora": "C8",
    "lora-muon": "C7",
    "lora-sb": "C6",
    "lora-xs": "C9",
}


def markdown(record: dict[str, Any]) -> str:
    """Return the loss of each method at its best learning rate, the whole sweep, and the source of the figures."""
    results = record["results"]
    parts = [_setting(record), _tuned_table(results), _READING]
    if "start_scales" in results:
        parts += [_scales_table(results), _SCALES]
    if results.get("regret"):
        parts += [_regret_table(results), _REGRET]
    if any(len(tuned["alphas"]) > 1 for tuned in results["methods"].values()):
        parts += [
            _alphas_table(results),
            "alpha is given as a multiple of r. The records that choose the rate choose it too.",
        ]
    parts += [_sweep_table(results)]
    if results["paired_at_rates"]:  # empty for one method
        parts += [_AT_RATES.format(baseline=results["baseline"]), _rates_table(results)]
    return "\n\n".join([*parts, source_line(record)])


_AT_RATES = "Difference from {baseline} at the same learning rate, seed by seed, with 95% t intervals:"
_SCALES = (
    "The drawn factors A and B begin as c A and B / c, whose product is the same, at the same learning "
    "rate. The movement is taken seed by seed against c = 1."
)
_REGRET = (
    "What the learning rate chosen in the other sweep loses here beside the rate chosen here, seed by seed: 0 where "
    "both are the same rate."
)
_OPTIMIZERS = {"adamw": "AdamW without weight decay", "sgd": "SGD with momentum 0.9"}


_FACTOR = 4  # by which a rate of the headline is wrong


def headline(record: dict[str, Any]) -> str:
    """Return every method's held-out loss at its own best learning rate, and at one that is far too high."""
    arguments, results = record["arguments"], record["results"]
    baseline, methods = results["baseline"], results["methods"]
    best = ", ".join(_beside(f"`{m}` {methods[m]['mean']:.3f}", results["paired"].get(m)) for m in methods)
    sentence = (
        f"- {_model(arguments)}, r = {arguments['lora_rank']}, {arguments['steps']} steps, {len(arguments['seeds'])} "
        f"seeds. Held-out loss (difference, its 95% interval), each method at its own best learning rate: {best}."
    )
    rate = _FACTOR * methods[baseline]["best_learning_rate"]
    losses = {
        m: dict(zip(tuned["learning_rates"], tuned["sweep"], strict=True)).get(rate) for m, tuned in methods.items()
    }
    if any(entry is None or entry["mean"] is None for entry in losses.values()):  # not run, or not finite
        return sentence
    pairs = {m: next(e for e in of_m if e["learning_rate"] == rate) for m, of_m in results["paired_at_rates"].items()}
    wrong = ", ".join(_beside(f"`{m}` {losses[m]['mean']:.3f}", pairs.get(m)) for m in methods)
    carried = f" `{MOMENTS}` is `carry_moments=True`." if any(method.endswith(MOMENTS) for method in methods) else ""
    return f"{sentence} All at {_FACTOR} times {baseline}'s best rate: {wrong}.{carried}"


def _beside(text: str, pair: dict[str, Any] | None) -> str:
    """Append the paired difference from the baseline and its interval."""
    if pair is None:
        return text
    low, high = pair["interval"]
    return f"{text} ({pair['mean']:+.3f}; {low:+.3f} to {high:+.3f})"


def _model(arguments: dict[str, Any]) -> str:
    if arguments["model"] == "smollm2":
        return "SmolLM2-135M-Instruct"
    return (arguments["model"] or "embedded model").rstrip("/").rsplit("/", 1)[-1]


def _setting(record: dict[str, Any]) -> str:
    arguments, results = record["arguments"], record["results"]
    material = results["material"]
    text = ", ".join("/".join(name.split("/")[-2:]) for name in arguments["dataset"]) or "embedded records"
    rates = [len(tuned["learning_rates"]) for tuned in results["methods"].values()]
    start = {"zero": "B = 0 at the start", "drawn": "both factors drawn, their product taken off the base"}
    return (
        f"{_model(arguments)} on {text}: {arguments['steps']} steps of {arguments['batch_size']} records, r = "
        f"{arguments['lora_rank']}, {start[arguments['start']]}, {arguments['warmup_steps']} steps of plain LoRA "
        f"first{_exceptions(arguments)}; {_OPTIMIZERS[arguments['optimizer']]}, "
        f"{'base in bf16, ' if arguments['bf16'] else ''}cosine after "
        f"{arguments['lr_warmup_steps']} rising steps. "
        f"{material['train_records']:,} records to train on, {material['choosing_records']:,} held out to choose the "
        f"learning rate, {material['held_out_records']:,} held out and reported. "
        f"{len(arguments['seeds'])} seeds and {_from_to(rates)} learning rates for every method."
    )


def _from_to(counts: list[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


_READING = (
    "Final held-out loss, mean ± standard deviation over seeds. The differences are taken seed by seed, each method "
    "at its own best learning rate, with 95% t intervals: one that contains 0 shows no difference. Other held-out "
    "records choose the learning rate; with the halves exchanged the reported ones choose, and those are reported. At "
    "equal time a method ends at the step that it has reached when the baseline has finished; the rate's schedule is "
    "then not at its end. Steps to the baseline's loss are read off the mean curve. Ranges are interpolated in log "
    "lr; ≥ marks those that reach an end of the grid. Steps are timed one method after the other in one process, "
    "after the sweep."
)


def _exceptions(arguments: dict[str, Any]) -> str:
    methods = set(arguments["methods"])
    own = [method for method in ("lora-muon", "lora-rite") if method in methods]
    exceptions = f" ({' and '.join(own)} act{'s' if len(own) == 1 else ''} from the first step)" if own else ""
    if methods & {"lora-sb", "lora-xs"}:
        exceptions += f"; lora-sb and lora-xs train R of r = {arguments['latent_rank']} from their own start"
    carried = [method for method in arguments["methods"] if method.endswith(MOMENTS)]
    if carried:
        exceptions += f"; NAME{MOMENTS} is NAME with carry_moments=True"
    return exceptions


def _tuned_table(results: dict[str, Any]) -> str:
    baseline = results["baseline"]
    header = ["", "best lr", "held-out loss", f"difference from {baseline}", "halves exchanged", "at equal time"]
    rows = []
    for method, tuned in results["methods"].items():
        best = tuned["sweep"][tuned["learning_rates"].index(tuned["best_learning_rate"])]
        edge = "" if tuned["best_inside_grid"] or len(tuned["learning_rates"]) == 1 else " (at the grid's edge)"
        alpha = f", alpha {tuned['alpha']:g} r" if len(tuned["alphas"]) > 1 else ""
        row = [method, f"{tuned['best_learning_rate']:.3g}{alpha}{edge}", _loss(best)]
        row += [_difference(results["paired"].get(method)), _difference(results["paired_exchanged"].get(method))]
        reached = tuned["steps_to_baseline"]
        row += [_difference(results["paired_at_equal_time"].get(method))]
        row += ["not reached" if reached is None else f"{reached:.0f}"]
        step = results["step_ms"][method]
        width = _range(tuned["good_range"]) if len(tuned["learning_rates"]) > 1 else ""
        row += [width, f"{step['median']:.1f} ({step['q1']:.1f} to {step['q3']:.1f})"]
        rows.append(row)
    return table([*header, f"steps to {baseline}'s loss", "lr within 1%", "step, ms (quartiles)"], rows)


def _scales_table(results: dict[str, Any]) -> str:
    scales = [entry["start_scale"] for entry in next(iter(results["start_scales"].values()))]
    header = [
        "",
        *(f"c = {scale:g}" for scale in scales),
        *(f"moved by c = {scale:g}" for scale in scales if scale != 1),
    ]
    rows = []
    for method, entries in results["start_scales"].items():
        moved = [_difference(entry["moved"]) for entry in entries if entry["start_scale"] != 1]
        rows.append([method, *map(_loss, entries), *moved])
    return table(header, rows)


def _regret_table(results: dict[str, Any]) -> str:
    rows = []
    for method, regret in results["regret"].items():
        if regret is None:
            rows.append([method, "not run here", "", ""])
            continue
        mean = "diverges" if regret["mean"] is None else f"{regret['mean']:.4f} ± {regret['sd']:.4f}"
        rows.append([method, f"{regret['learning_rate']:.3g}", mean, _difference(regret["loss"])])
    return table(["", "lr chosen elsewhere", "held-out loss", "above the best here"], rows)


def _alphas_table(results: dict[str, Any]) -> str:
    rows = []
    for method, tuned in results["methods"].items():
        for entry in tuned["alphas"]:
            mean = "diverges" if entry["mean"] is None else f"{entry['mean']:.4f} ± {entry['sd']:.4f}"
            rows.append([method, f"{entry['alpha']:g} r", f"{entry['best_learning_rate']:.3g}", mean])
    return table(["", "alpha", "best lr", "held-out loss"], rows)


def _sweep_table(results: dict[str, Any]) -> str:
    """Return the losses at every rate; the methods need not have the same rates."""
    methods = results["methods"]
    rates = sorted({rate for tuned in methods.values() for rate in tuned["learning_rates"]})
    rows = []
    for rate in rates:
        cells = []
        for tuned in methods.values():
            known = tuned["learning_rates"]
            cells.append(_loss(tuned["sweep"][known.index(rate)]) if rate in known else "")
        rows.append([f"{rate:.3g}", *cells])
    return table(["lr", *methods], rows)


def _rates_table(results: dict[str, Any]) -> str:
    differences = {
        method: {entry["learning_rate"]: entry for entry in entries}
        for method, entries in results["paired_at_rates"].items()
    }
    rates = sorted({rate for by_rate in differences.values() for rate in by_rate})
    rows = [[f"{rate:.3g}", *(_difference(found.get(rate)) for found in differences.values())] for rate in rates]
    return table(["lr", *differences], rows)


def _loss(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        diverged = sum(value is None for value in entry["final_loss"])
        return f"diverges ({diverged} of {len(entry['final_loss'])} seeds)"
    return f"{entry['mean']:.4f} ± {entry['sd']:.4f}"


def _difference(paired: dict[str, Any] | None) -> str:
    if paired is None:
        return ""
    if paired["interval"] is None:
        return "no estimate" if paired["mean"] is None else f"{paired['mean']:+.4f} (one seed)"
    low, high = paired["interval"]
    return f"{paired['mean']:+.4f} ({low:+.4f} to {high:+.4f})"


def _range(found: dict[str, Any]) -> str:
    if found["factor"] is None:
        return "none"
    at_least = "≥ " if found["low_open"] or found["high_open"] else ""
    return f"{at_least}{found['factor']:.2f} x ({found['low']:.2g} to {found['high']:.2g})"


def plot(record: dict[str, Any]) -> Any:
    """Plot held-out loss by step and by training time at each method's best rate, and final loss by rate."""
    from matplotlib.figure import Figure

    results = record["results"]
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    by_step, by_time, by_rate = figure.subplots(1, 3)
    for index, (method, tuned) in enumerate(results["methods"].items()):
        colour, curves = COLOURS.get(method, f"C{index + 4}"), tuned["curves"]
        label = f"{method}, lr {tuned['best_learning_rate']:.3g}"
        seconds = [step * results["step_ms"][method]["median"] / 1e3 for step in curves["held_out_steps"]]
        _band(by_step, curves["held_out_steps"], curves["held_out"], colour, label)
        _band(by_time, seconds, curves["held_out"], colour, label)
        _band(by_rate, tuned["learning_rates"], tuned["sweep"], colour, method, marker="o")
    by_step.set(xlabel="step", ylabel="held-out loss, mean and standard deviation over seeds")
    by_time.set(xlabel="training time, s (steps x median step)")
    by_rate.set(xlabel="learning rate", ylabel="final held-out loss", xscale="log")
    _limit(results, by_step, by_time, by_rate)
    for axes in (by_step, by_time, by_rate):
        axes.legend()
    return figure


def _band(axes: Any, x: list[float], entries: list[dict[str, Any]], colour: str, label: str, marker: str = "") -> None:
    """Draw a mean with its standard deviation shaded, and a gap where runs diverged."""
    nan = float("nan")
    mean = [nan if entry["mean"] is None else entry["mean"] for entry in entries]
    sd = [nan if entry["sd"] is None else entry["sd"] for entry in entries]
    axes.plot(x, mean, color=colour, label=label, marker=marker)
    low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _limit(results: dict[str, Any], *panels: Any) -> None:
    """Limit the axis to the last third of the fall of the loss, where methods and rates differ."""
    methods = results["methods"].values()
    means = [entry["mean"] for tuned in methods for entry in tuned["sweep"] if entry["mean"] is not None]
    start = next(iter(methods))["curves"]["held_out"][0]["mean"]
    if means and start is not None and min(means) < start:
        way = start - min(means)
        for axes in panels:
            axes.set_ylim(min(means) - 0.03 * way, min(means) + way / 3)
