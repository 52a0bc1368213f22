"""An output folder that an earlier run has used: it is refused, emptied of checkpoints, or the run's own to resume."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from reflora_dist.checkpoints.complete import saved_checkpoints
from reflora_dist.collectives.ranks import is_first_rank, raise_on_all_ranks, world_size
from reflora_dist.files.open_files import read_json
from reflora_dist.files.records import require_fields

from .recorder import METRICS_FILE

SETTINGS_ENTRY = "RunSettings"
_DAMAGED = "it is damaged, name an earlier checkpoint"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of its run.

    Attributes:
        folder: the checkpoint.
        step: optimizer steps that were done.
        epoch: epochs that were done.
        settings: the settings with which the run began; None if an earlier release wrote the checkpoint.
        changes: ``{"step": s, NAME: [old, new], ...}`` for every time that the run was resumed with other settings.
    """

    folder: str
    step: int
    epoch: float
    settings: dict[str, Any] | None
    changes: list[dict[str, Any]]


class StepsAreDone(Exception):
    """Every step of the run is in its checkpoint."""


class NoFurtherStep(TrainerCallback):
    """Ends training before its first step. transformers would take one step beyond the last."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise StepsAreDone


def on_first_rank(look: Callable[[], _T]) -> _T:
    """Return what the first rank finds. The others do not look, because storage may show ranks different files.

    Raises:
        ValueError: on every rank, if the first one raised ValueError or OSError.

    Communication: one broadcast of a small object; every rank must call.
    """
    found: list[Any] = [None, None]
    if is_first_rank():
        try:
            found[0] = look()
        except (OSError, ValueError) as error:
            found[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def refuse_used_folder(arguments: Any) -> None:
    """Refuse a new run in a folder with checkpoints of another. Every rank must call.

    Raises:
        ValueError: on every rank; ``output_dir`` has checkpoints, and neither ``resume_from_checkpoint`` goes on from
            them nor ``overwrite_output_dir`` removes them, or both are given.
    """
    asked, output_dir = arguments.resume_from_checkpoint, arguments.output_dir
    goes_on = asked == "auto" or (asked is not None and Path(asked).resolve().parent == Path(output_dir).resolve())
    if arguments.overwrite_output_dir:
        if goes_on:
            raise ValueError(
                f"overwrite_output_dir=True would remove what resume_from_checkpoint={asked!r} goes on from: give one"
            )
        return
    found = on_first_rank(lambda: [path.name for path in saved_checkpoints(output_dir)])
    if found and not goes_on:
        raise ValueError(
            f"output_dir={output_dir!r} has checkpoints of an earlier run (the last is {found[-1]}): give "
            "--resume_from_checkpoint auto to go on from it, --overwrite_output_dir True to start anew and remove "
            "them, or another --output_dir"
        )


def remove_checkpoints(output_dir: str) -> None:
    """Remove the checkpoints of an earlier run, and nothing else in the folder. Every rank must call.

    Raises:
        OSError, RuntimeError: on every rank; a checkpoint cannot be removed.

    Communication: one all-gather of small objects.
    """
    with raise_on_all_ranks("removing the checkpoints of the earlier run"):
        for path in saved_checkpoints(output_dir) if is_first_rank() else ():
            print(f"removing {path}, of an earlier run", flush=True)
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)


def saved_run(checkpoint: str) -> SavedRun:
    """Return what a checkpoint says of its run. Every rank must call.

    Raises:
        ValueError: on every rank; the checkpoint's state is damaged.
    """
    return on_first_rank(lambda: _saved_run(checkpoint))


def _saved_run(checkpoint: str) -> SavedRun:
    path = Path(checkpoint) / TRAINER_STATE_NAME
    state = read_json(path, _DAMAGED)
    require_fields(state, {"global_step": int}, path, _DAMAGED)
    callbacks = state.get("stateful_callbacks")
    entry = callbacks.get(SETTINGS_ENTRY) if isinstance(callbacks, Mapping) else None
    if entry is not None:
        require_fields(entry, {"settings": Mapping, "settings_changed": list}, path, _DAMAGED)
    entry = entry or {"settings": None, "settings_changed": []}
    return SavedRun(
        checkpoint, state["global_step"], float(state.get("epoch") or 0), entry["settings"], entry["settings_changed"]
    )


def steps_are_done(saved: SavedRun, arguments: Any) -> bool:
    """Return whether a run has no step left."""
    if arguments.max_steps > 0:
        return saved.step >= arguments.max_steps
    return saved.epoch >= arguments.num_train_epochs


def results_are_there(saved: SavedRun, output_dir: str) -> bool:
    """Return whether the run has written its results after its last step. Every rank must call."""

    def written() -> bool:
        path = Path(output_dir) / METRICS_FILE
        return path.is_file() and read_json(path).get("steps") == saved.step

    return on_first_rank(written)
