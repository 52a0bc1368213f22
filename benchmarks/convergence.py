"""Compare the convergence of methods: loss by step and by time from one start, each at its best learning rate.

    python benchmarks/convergence.py --output benchmarks/results/convergence/embedded_HARDWARE_YYYYMM.json

Every method trains at every learning rate of one grid and with every seed. A seed fixes the initial factors and the
order of the data, which all methods share. Half of the held-out records choose a method's learning rate, and alpha
where several are given; the other half is reported. Finished runs are kept in a .jsonl file beside the output. An
interrupted sweep, or one with further learning rates or seeds, continues with the missing runs; runs of the same
settings are also taken from the other .jsonl files of that folder. The record holds all learning rates whose seeds are
complete.

What the learning rates of another sweep lose at another r, and how they stand badly scaled starts:

    ... --lora_rank 64 --tuned_in FILE.json
    ... --start drawn --start_scales 1 0.1 10 --only_tuned True --tuned_in FILE.json
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.names import ALL_METHODS, MOMENTS, SWEPT_METHODS
from benchmarks.harness.options import parse, require_known, require_positive
from launchers.data.tokenization import TEMPLATE_NAMES
from launchers.screen.foreign import filter_foreign
from reflora_dist.command_line.help import answer_help


def _list(values: Sequence[Any], help_text: str) -> Any:
    return dataclasses.field(default_factory=lambda: list(values), metadata={"help": help_text})


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass
class Arguments:
    """The sweep (methods x learning rates x seeds), the model and the text."""

    methods: list[str] = _list(ALL_METHODS, f"methods to compare; NAME{MOMENTS} is one with carry_moments=True")  # noqa: RUF009
    learning_rates: list[float] = _list([1.25e-3 * 2**k for k in range(7)], "the grid, the same for every method")  # noqa: RUF009
    seeds: list[int] = _list(range(5), "one run of every method and learning rate each")  # noqa: RUF009
    steps: int = _option(250, "optimizer steps of a run")
    start: str = _option(
        "zero", "zero: PEFT's start, B = 0; drawn: B drawn as A is, and the product taken off the base"
    )
    warmup_steps: int = _option(10, "steps of plain LoRA first; start=drawn needs none")
    lr_warmup_steps: int = _option(10, "steps over which the learning rate rises; a cosine follows")
    batch_size: int = _option(8, "records per step")
    optimizer: str = _option("adamw", "adamw, without weight decay; or sgd, with momentum 0.9")
    lora_rank: int = _option(8, "r of all methods but lora-sb and lora-xs")
    alphas: list[float] = _list([2.0], "lora_alpha as a multiple of r; several are tuned with the learning rate")  # noqa: RUF009
    start_scales: list[float] = _list([1.0], "c; start=drawn begins with c A and B / c, the same product")  # noqa: RUF009
    latent_rank: int = _option(32, "r of lora-sb and lora-xs, which train r * r numbers per layer")
    bf16: bool = _option(False, "hold the base in bf16 and compute in bf16; the adapters stay in fp32")
    max_length: int = _option(128, "tokens of prompt and answer together")
    eval_every: int = _option(25, "steps between two evaluations on the held-out records")
    model: str | None = _option(None, "folder of a pre-trained model, or smollm2; default: the embedded one, made here")
    dataset: list[str] = _list([], "local JSON or JSONL instruction files; default: the embedded records")  # noqa: RUF009
    eval_dataset: list[str] = _list([], "held-out files; default: --eval_fraction of --dataset")  # noqa: RUF009
    prompt_template: str | None = _option(None, f"one of {', '.join(TEMPLATE_NAMES)}; default: as in finetune.py")
    eval_fraction: float = _option(0.1, "share of --dataset held out if there is no --eval_dataset")
    max_eval_records: int = _option(256, "held-out records: every other one chooses the learning rate")
    cache_dir: str | None = _option(None, "folder of the embedded model and records; default: the launchers'")
    tuned_in: list[str] = _list(  # noqa: RUF009
        [], "records of sweeps whose chosen learning rates are tried here; the first that has a method counts"
    )
    extend: bool = _option(
        False, "train at further rates, by method, until the best one and the range within 1% of it lie inside the grid"
    )
    only_tuned: bool = _option(False, "train at the learning rates and alphas of --tuned_in alone")
    timed_rounds: int = _option(6, "blocks of steps per method that time a step, after the sweep")
    workers: int | None = _option(None, "runs beside each other; default: one per CPU core, on a GPU at most 8")
    output: str | None = _option(None, "JSON file to write; finished runs go to .jsonl beside it")

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in SWEPT_METHODS:
                raise ValueError(f"methods: {method!r} is unknown; choose from {', '.join(SWEPT_METHODS)}")
        for name in ("methods", "learning_rates", "seeds", "alphas", "start_scales"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must hold at least one value, and each only once")
        for name in ("learning_rates", "alphas", "start_scales"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must all be above 0")
        if self.start != "drawn" and self.start_scales != [1.0]:
            raise ValueError(f"start_scales={self.start_scales} needs --start drawn; B = 0 has no scale")
        if self.only_tuned and not self.tuned_in:
            raise ValueError("only_tuned=True needs --tuned_in, the record of a sweep")
        # with an optimizer of their own, or moments of Adam's
        needing = {"reflora-s", *METHOD_OPTIMIZERS, *LATENT_METHODS}
        own = [name for name in self.methods if name in needing or name.endswith(MOMENTS)]
        if self.optimizer == "sgd" and own:
            raise ValueError(f"optimizer='sgd' does not go with {', '.join(own)}; give --methods without them")
        require_known(self, start=STARTS, optimizer=OPTIMIZERS, prompt_template=TEMPLATE_NAMES)
        for name in ("warmup_steps", "lr_warmup_steps"):
            if not 0 <= getattr(self, name) < self.steps:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below steps={self.steps}")
        if not self.warmup_steps and f"reflora{MOMENTS}" in self.methods:
            raise ValueError(f"methods: reflora{MOMENTS} carries the moments of the warm-up, and warmup_steps=0")
        if self.extend and (self.only_tuned or len(self.learning_rates) < 2):
            raise ValueError("extend=True needs a grid of two learning rates or more, and no --only_tuned")
        sizes = ("batch_size", "lora_rank", "latent_rank", "eval_every", "max_eval_records", "timed_rounds", "workers")
        require_positive(self, *sizes)
        if self.eval_dataset and not self.dataset:
            raise ValueError(f"eval_dataset={self.eval_dataset} needs --dataset; the embedded records bring their own")

    def schedule(self) -> Schedule:
        """Return what all runs share."""
        return Schedule(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Schedule)})

    def tasks(self, tuned: dict[str, Any]) -> list[Task]:
        """Return all runs, seed by seed, so that an interrupted sweep holds whole comparisons.

        Args:
            tuned: by method, its entry in ``results["methods"]`` of the sweeps that ``tuned_in`` names.

        Raises:
            ValueError: ``only_tuned``, and those sweeps lack a method.
        """
        tasks = []
        for seed, method in itertools.product(self.seeds, self.methods):
            alphas = self.alphas[:1] if method in LATENT_METHODS else self.alphas  # those have no alpha
            settings = list(itertools.product(self.learning_rates, alphas))
            if self.only_tuned:
                if method not in tuned:
                    raise ValueError(f"tuned_in={self.tuned_in} has no learning rate of {method}")
                settings = [(tuned[method]["best_learning_rate"], tuned[method]["alpha"])]
            scales = self.scales(method)
            tasks += [Task(method, rate, seed, alpha, scale) for rate, alpha in settings for scale in scales]
        return tasks

    def scales(self, method: str) -> list[float]:
        """Return the scales of a method's start. LoRA-SB and LoRA-XS have a start of their own, and no scale."""
        return [1.0] if method in LATENT_METHODS else self.start_scales


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds
    filter_foreign()

import torch

from benchmarks.harness import engines, recording, timing
from benchmarks.reports.convergence import markdown
from benchmarks.sweep.data import Material, prepare
from benchmarks.sweep.runs import Workbench, sweep
from benchmarks.sweep.same_start import assert_same_start
from benchmarks.sweep.statistics import open_ends, summarize
from benchmarks.sweep.tasks import (
    OPTIMIZERS,
    STARTS,
    Schedule,
    Task,
    append_finished,
    load_finished,
    settings_digest,
    task_of,
)
from reflora_dist.files.cache import default_cache_dir
from reflora_dist.files.open_files import read_json
from reflora_dist.methods.names import LATENT_METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS

MAX_EXTENSIONS = 6  # by which a grid grows at either end
GPU_WORKERS = 8  # small models do not fill a GPU; each process takes about half a GiB of its memory


def main() -> None:
    arguments = parse(Arguments)
    device = engines.single_process_device("start it without a launcher and give --workers")
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in the workers: timing and runs see the same
    material = prepare(
        arguments.model,
        arguments.dataset,
        arguments.eval_dataset,
        max_length=arguments.max_length,
        prompt_template=arguments.prompt_template,
        max_eval_records=arguments.max_eval_records,
        eval_fraction=arguments.eval_fraction,
        cache_dir=Path(arguments.cache_dir).expanduser() if arguments.cache_dir else default_cache_dir(),
    )
    provenance = recording.provenance(device)
    tuned: dict[str, Any] = {}
    for name in arguments.tuned_in:
        tuned = read_json(Path(name))["results"]["methods"] | tuned
    tasks = arguments.tasks(tuned)
    bench = Workbench(material, arguments.schedule(), device)
    runs, description = run_all(arguments, tasks, bench, material, provenance)
    step_ms = bench.time_steps(arguments.methods, arguments.timed_rounds)
    results = summarize(runs, step_ms, {} if arguments.only_tuned else tuned)
    record = {
        "benchmark": "convergence",
        **provenance,
        "arguments": dataclasses.asdict(arguments),
        "results": {"material": description, "step_ms": step_ms, **results, "runs": [_short(run) for run in runs]},
    }
    if arguments.output is not None:
        recording.write_json(arguments.output, record)
    print(markdown(record))


def run_all(
    arguments: Arguments, tasks: list[Task], bench: Workbench, material: Material, provenance: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Finish the sweep. Returns its runs, with those of earlier calls, and the text's description."""
    description = material.describe()
    settings = settings_digest(description, bench.schedule, bench.device)
    path = Path(arguments.output).with_suffix(".jsonl") if arguments.output else None
    finished: dict[Task, dict[str, Any]] = {}
    for beside in sorted(path.parent.glob("*.jsonl")) if path else ():
        finished |= load_finished(beside, settings)
    source = {"settings": settings, **{name: provenance[name] for name in ("commit", "hardware", "date")}}
    for _ in range(1 + MAX_EXTENSIONS):
        _run_missing(arguments, tasks, bench, material, finished, path, source)
        runs = complete(finished, arguments)
        tasks = further_tasks(arguments, runs) if arguments.extend else []
        if not tasks:
            break
    assert_same_start(runs, arguments.warmup_steps)
    return runs, description


def further_tasks(arguments: Arguments, runs: list[dict[str, Any]]) -> list[Task]:
    """Return the runs at the rates by which the grid has to grow."""
    ends = open_ends([run for run in runs if run["start_scale"] == 1.0])
    return [
        Task(method, rate, seed, alpha, scale)
        for (method, alpha, rate), seed in itertools.product(ends, arguments.seeds)
        for scale in arguments.scales(method)
    ]


def _run_missing(
    arguments: Arguments,
    tasks: list[Task],
    bench: Workbench,
    material: Material,
    finished: dict[Task, dict[str, Any]],
    path: Path | None,
    source: dict[str, str],
) -> None:
    """Run the tasks that are not finished; add them to ``finished``, and to the file at ``path``."""
    missing = [task for task in tasks if task not in finished]
    workers = arguments.workers or default_workers(bench.device)
    print(f"{len(tasks)} runs, {len(tasks) - len(missing)} finished before, {workers} at a time", flush=True)
    began = time.perf_counter()
    with timing.progress(len(missing), "runs") as advance:
        for done, run in enumerate(sweep(missing, bench, material, workers), start=1):
            alike = [other for other in finished.values() if other["seed"] == run["seed"]]
            assert_same_start([*alike, run], arguments.warmup_steps)
            append_finished(path, {**source, **run})
            finished[task_of(run)] = {**source, **run}
            advance()
            if done == min(2 * workers, len(missing)):  # the first runs of the workers include their start
                minutes = (time.perf_counter() - began) / done * (len(missing) - done) / 60
                print(f"{done} of {len(missing)} runs done, about {minutes:.1f} min left", flush=True)


def complete(finished: dict[Task, dict[str, Any]], arguments: Arguments) -> list[dict[str, Any]]:
    """Return the runs of the sweep whose settings were run with all of its seeds, at whatever learning rate."""
    methods, seeds = arguments.methods, arguments.seeds
    by_settings: dict[Task, dict[int, Any]] = {}
    for task, run in finished.items():
        asked = task.alpha in arguments.alphas and task.start_scale in arguments.start_scales
        if task.method in methods and task.seed in seeds and (asked or task.method in LATENT_METHODS):
            by_settings.setdefault(dataclasses.replace(task, seed=0), {})[task.seed] = run
    ordered = sorted(by_settings, key=lambda task: methods.index(task.method))  # sorting keeps the order of equals
    return [by_settings[task][seed] for task in ordered if len(by_settings[task]) == len(seeds) for seed in seeds]


def default_workers(device: torch.device) -> int:
    """Return one worker per core that this process may use; on a GPU at most GPU_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, GPU_WORKERS) if device.type == "cuda" else cores


def _short(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run without its losses by step. The curves show their mean and spread."""
    return {key: value for key, value in run.items() if key not in ("train_losses", "settings")}


if __name__ == "__main__":
    main()
