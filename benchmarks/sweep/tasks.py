"""What a sweep consists of, and the file that keeps its finished runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.sweep.data import SORTED_BATCHES

# zero: PEFT's default, B = 0. drawn: B is drawn like A, and the product is subtracted from the base (the published
# code's re_init). Then the model is the same, and S exists from the first step on.
STARTS = ("zero", "drawn")
OPTIMIZERS = ("adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The settings that all runs of a sweep share.

    Attributes:
        steps: optimizer steps of a run.
        start: one of STARTS.
        warmup_steps: steps of plain LoRA first.
        lr_warmup_steps: steps over which the learning rate rises; a cosine follows.
        batch_size: records per step.
        lora_rank: r; every linear layer but the head gets an adapter.
        latent_rank: r of LoRA-SB and LoRA-XS, which train r * r numbers per layer; s = 1, as published.
        eval_every: steps between two evaluations.
        bf16: the base is held and computed in bf16, the adapters are held in fp32, as finetune.py --bf16 does.
        optimizer: one of OPTIMIZERS; sgd has momentum 0.9.
    """

    steps: int
    start: str
    warmup_steps: int
    lr_warmup_steps: int
    batch_size: int
    lora_rank: int
    latent_rank: int
    eval_every: int
    bf16: bool = False
    optimizer: str = "adamw"


@dataclasses.dataclass(frozen=True)
class Task:
    """One run of a sweep.

    Attributes:
        alpha: ``lora_alpha`` as a multiple of r: the scaling of the update ``B A``.
        start_scale: c; the drawn factors A and B become c A and B / c, which leaves their product.
    """

    method: str
    learning_rate: float
    seed: int
    alpha: float = 2.0
    start_scale: float = 1.0


def settings_digest(material: dict[str, Any], schedule: Schedule, device: torch.device) -> str:
    """Return a digest of text, model, schedule and kind of device. Only runs with equal digests are compared.

    Machines of one kind may share a sweep: they draw the same factors, and differ by rounding only.
    """
    # without what is at its default: a setting that is younger than a sweep is at its default there
    fields = dataclasses.fields(schedule)
    shared = {field.name: value for field in fields if (value := getattr(schedule, field.name)) != field.default}
    settings = [material, shared, device.type, f"sorted by {SORTED_BATCHES}"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load_finished(path: Path, settings: str) -> dict[Task, dict[str, Any]]:
    """Return the finished runs of earlier, perhaps interrupted sweeps with the same settings."""
    finished = {}
    for line in path.read_text().splitlines():
        try:
            run = json.loads(line)
        except json.JSONDecodeError:  # the line was cut off while it was written
            continue
        if isinstance(run, dict) and run.get("settings") == settings:  # or it is a file of another kind
            finished[task_of(run)] = run
    return finished


def task_of(run: dict[str, Any]) -> Task:
    """Return the task that a run's result belongs to."""
    return Task(**{field.name: run[field.name] for field in dataclasses.fields(Task)})


def append_finished(path: Path | None, run: dict[str, Any]) -> None:
    """Append a run's line. If an interruption cut off the last line, end that line first."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with open(path, "a") as file:
        file.write(("" if whole else "\n") + json.dumps(run) + "\n")
