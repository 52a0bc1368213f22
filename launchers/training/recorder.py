"""Record the figures of a run: losses by step, seconds per step, bytes per step and peak memory."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from reflora_dist.files.records import write_json

METRICS_FILE = "metrics.json"
CARD_FILE = "README.md"
PLOT_FILE = "loss.png"
METHOD_PLOT_FILE = "method.png"
RECORDED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")


class RunRecorder(TrainerCallback):
    """Time every optimizer step, and print on rank 0 what was attached.

    This callback must come after the method's callback, because it reads the report of that one.

    Args:
        method_callback: the callback that applies the method.
        has_warmup: whether the method starts after a warm-up of plain LoRA, which ``method_callback.config`` holds.
    """

    def __init__(self, method_callback: Any, has_warmup: bool) -> None:
        self.method_callback = method_callback
        self.has_warmup = has_warmup
        self.step_seconds: list[float] = []
        self.further_data: dict[str, Any] = {}  # data sets by name, evaluated once after training
        self._step_start = 0.0

    @property
    def warmup_steps(self) -> int | None:
        """Optimizer steps before the method's first, known once training begins; None if the method has no warm-up."""
        return self.method_callback.config.warmup_steps if self.has_warmup else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print(describe_attachment(self.report(), self.warmup_steps, args.world_size), flush=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._step_start)
        if state.global_step >= state.max_steps and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True  # the last step too
        if self.warmup_steps is not None and state.global_step == self.warmup_steps + 1 and state.is_world_process_zero:
            print(
                f"step {state.global_step}: refactored; {describe_traffic(self.report())}",
                flush=True,
            )

    def report(self) -> dict[str, Any]:
        """Return the package's report as a JSON-ready dictionary."""
        return self.method_callback.report().as_dict()


def describe_attachment(report: dict[str, Any], warmup_steps: int | None, world_size: int) -> str:
    """Describe in one line the engine, layout, pairs and their r, and when refactoring begins."""
    ranks = "/".join(str(r) for r in report["lora_ranks"])
    begins = "never refactors"
    if warmup_steps is not None:
        begins = f"refactors from step {warmup_steps + 1} (--reflora_warmup_steps {warmup_steps})"
    return (
        f"attached {report['method']}: engine {report['engine']}, layout {report['layout']}, "
        f"{report['num_pairs']} pairs of rank {ranks} on {world_size} process(es), {begins}, "
        f"{describe_traffic(report)}"
    )


def describe_traffic(report: dict[str, Any]) -> str:
    """Describe the collectives and bytes that this rank issued in the last step."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["collectives_per_step"].items() if count)
    return f"{report['bytes_per_step']:,} bytes per step ({kinds or 'no collectives'} so far)"


def peak_memory_bytes(device: torch.device) -> tuple[int, str]:
    """Return the process's peak memory and its source: torch's allocator on a GPU, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "GPU allocator"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident set"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's figures."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def collect_metrics(trainer: Any, recorder: RunRecorder, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the comparison reads. Every rank must call; rank 0's result is the one to write.

    Losses are means over batches, as Trainer reports them. ``step_seconds_median`` leaves out evaluation and
    checkpoints; it and ``bytes_per_step`` are None if the run was resumed after its last step. ``peak_memory_bytes`` is
    the largest of all ranks, loading included.

    Communication: one gather of two numbers per rank.
    """
    peak, kind = peak_memory_bytes(trainer.args.device)
    report = recorder.report()
    local = torch.tensor([[peak, report["bytes_per_step"]]], dtype=torch.int64, device=trainer.args.device)
    peak, bytes_per_step = trainer.accelerator.gather(local).max(dim=0).values.tolist()
    history = trainer.state.log_history
    return {
        "method": settings["method"],
        "held_out_loss": [{"step": e["step"], "loss": e["eval_loss"]} for e in history if "eval_loss" in e],
        "train_loss": [{"step": e["step"], "loss": float(e["loss"])} for e in history if "loss" in e],
        "figures": [figures for entry in history if "loss" in entry and (figures := figures_of(entry))],
        "steps": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "step_seconds_median": statistics.median(recorder.step_seconds) if recorder.step_seconds else None,
        "bytes_per_step": bytes_per_step if recorder.step_seconds else None,
        "peak_memory_bytes": peak,
        "peak_memory_kind": kind,
        "report": report,
        "settings": settings,
        "versions": installed_versions(),
    }


def figures_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return step and figures of the method in an entry of Trainer's log; empty if it has none."""
    prefix = "reflora/"
    found = {name.removeprefix(prefix): float(value) for name, value in entry.items() if name.startswith(prefix)}
    return {"step": entry["step"], **found} if found else {}


def write_metrics(metrics: dict[str, Any], output_dir: str) -> Path:
    """Write the metrics beside the adapter, as a whole or not at all: they say that the run has its results."""
    path = Path(output_dir) / METRICS_FILE
    write_json(path, metrics)
    return path


def jsonable(options: Any) -> dict[str, Any]:
    """Return a dataclass of options as a JSON-ready dictionary."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))
