"""Put finished runs beside each other: a table of their metrics and one plot of their losses.

python launchers/compare.py outputs/lora outputs/reflora --plot outputs/comparison.png
"""

from __future__ import annotations

import itertools
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("launchers.compare", run_name="__main__", alter_sys=True)
    raise SystemExit

from .options import compare_parser
from .screen.commands import begin_command, run_command

if __name__ == "__main__":
    compare_parser().parse_args()  # --help and mistakes are answered before torch is imported, which takes seconds
    begin_command()

from rich.console import Console
from rich.table import Table

from reflora_dist.files.open_files import read_json
from reflora_dist.files.records import require_fields
from reflora_dist.methods.names import LATENT_METHODS

from .training.plots import plot_comparison
from .training.recorder import METRICS_FILE

# What may differ between runs that are compared; anything else would make the comparison unfair.
METHOD_SETTINGS = frozenset(
    ("method", "reflora_warmup_steps", "reflora_interval", "scaled_gd_damping", "carry_moments", "optim_args")
)
# Settings that only LoRA-SB and LoRA-XS read, or read otherwise: they train an r x r matrix between frozen factors.
LATENT_SETTINGS = frozenset(("lora_r", "lora_alpha", "lora_sb_batches", "lora_sb_learning_rate"))
_FIELDS: dict[str, Any] = {
    "method": str,
    "settings": Mapping,
    "report": Mapping,
    "train_loss": list,
    "held_out_loss": list,
    "world_size": int,
    "step_seconds_median": int | float,
    "bytes_per_step": int,
    "peak_memory_bytes": int,
    "peak_memory_kind": str,
}
START_TOLERANCE = 1e-3  # relative; the untrained adapter is zero, so only the order of sums differs


def load_run(folder: Path) -> dict[str, Any]:
    """Return the metrics of one finished run.

    Raises:
        ValueError: the folder holds no metrics, or they are damaged.
    """
    path, remedy = folder / METRICS_FILE, "give the output_dir of a finished run"
    run = read_json(path, remedy)
    # a run that was resumed after its last step has measured neither
    measured = {name: 0 for name in ("step_seconds_median", "bytes_per_step") if name in run and run[name] is None}
    require_fields(run | measured, _FIELDS, path, remedy)
    require_fields(run["report"], {"engine": str}, f"{path}, report", remedy)
    for name in ("train_loss", "held_out_loss"):
        for point in run[name]:
            require_fields(point, {"step": int, "loss": int | float}, f"{path}, {name}", remedy)
    return run


def check_comparable(runs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs that differ in more than the method.

    Raises:
        ValueError: a setting, the number of steps, or the held-out loss before training differs.
    """
    for first, run in itertools.combinations(runs, 2):
        methods = {first["method"], run["method"]}
        free = METHOD_SETTINGS | (LATENT_SETTINGS if methods & set(LATENT_METHODS) else frozenset())
        names = sorted(set(first["settings"]) | set(run["settings"]))
        for name in names:
            values = (first["settings"].get(name), run["settings"].get(name))
            if name not in free and values[0] != values[1]:
                raise ValueError(f"runs cannot be compared: {name} is {values[0]!r} in one, {values[1]!r} in another")
        if first.get("settings_changed", []) != run.get("settings_changed", []):
            changed = [r.get("settings_changed", []) for r in (first, run)]
            raise ValueError(f"runs cannot be compared: settings changed on the way: {changed[0]} and {changed[1]}")
        steps = [[point["step"] for point in r["held_out_loss"]] for r in (first, run)]
        if steps[0] != steps[1]:
            raise ValueError(f"runs cannot be compared: evaluated at steps {steps[0]} and {steps[1]}")
        # LoRA-SB starts from an estimated first step, so its loss differs
        if steps[0] and steps[0][0] == 0 and "lora-sb" not in methods:
            start, other = first["held_out_loss"][0]["loss"], run["held_out_loss"][0]["loss"]
            if abs(other - start) > START_TOLERANCE * start:
                raise ValueError(f"runs cannot be compared: they start from held-out losses {start} and {other}")


def comparison_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one column per run: held-out loss by step, time and bytes per step, peak memory."""
    table = Table(title=f"{runs[0]['report']['engine']} on {runs[0]['world_size']} process(es)")
    table.add_column("")
    for run in runs:
        table.add_column(run["method"], justify="right")
    for number, point in enumerate(runs[0]["held_out_loss"]):
        losses = [f"{run['held_out_loss'][number]['loss']:.4f}" for run in runs]
        table.add_row(f"held-out loss, step {point['step']}", *losses)
    for number, point in enumerate(runs[0].get("held_out_metrics", [])):
        for name in [name for name in point if name not in ("step", "set")]:
            scores = [run["held_out_metrics"][number][name] for run in runs]
            shown = ["none" if score is None else f"{score:.4f}" for score in scores]
            table.add_row(f"{name}, {point['set']}, step {point['step']}", *shown)
    table.add_section()
    seconds = [run["step_seconds_median"] for run in runs]
    table.add_row("time per step, median (ms)", *("none" if s is None else f"{1e3 * s:.0f}" for s in seconds))
    sent = [run["bytes_per_step"] for run in runs]
    table.add_row("bytes per step and rank", *("none" if count is None else f"{count:,}" for count in sent))
    kind = runs[0]["peak_memory_kind"]
    table.add_row(f"peak memory, {kind} (GiB)", *(f"{run['peak_memory_bytes'] / 2**30:.2f}" for run in runs))
    return table


def main() -> None:
    options = compare_parser().parse_args()
    try:
        runs = [load_run(folder) for folder in options.runs]
        check_comparable(runs)
    except ValueError as error:
        raise SystemExit(f"compare.py: error: {error}") from error
    Console(width=None if sys.stdout.isatty() else 100).print(comparison_table(runs))
    plot = plot_comparison(runs, options.plot)
    print(f"bytes: the method's own collectives, not the engine's\nplot: {plot or 'none, since no loss was logged'}")


if __name__ == "__main__":
    run_command(main)
