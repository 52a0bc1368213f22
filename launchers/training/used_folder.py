"""An output folder that an earlier run has used: it is refused, emptied of checkpoints, or the run's own to resume."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from reflora_dist.checkpoints.complete import job_of, last_complete_checkpoint, require_complete, saved_checkpoints
from reflora_dist.collectives.ranks import is_first_rank, raise_on_all_ranks, world_size
from reflora_dist.files.open_files import read_json
from reflora_dist.files.records import require_fields

from .options import Options, check_output_dir
from .recorder import CARD_FILE, METHOD_PLOT_FILE, METRICS_FILE, PLOT_FILE
from .run_file import RUN_FILE, is_written_by_a_run

SETTINGS_ENTRY = "RunSettings"
# set by the batch scripts in launchers/slurm when a job was queued again
RESTARTED = "REFLORA_RESTARTED"
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


def earlier_run(options: Options) -> SavedRun | None:
    """Return what the checkpoint to resume from says of its run; None for a new run. Every rank must call.

    Raises:
        ValueError: ``output_dir`` cannot be used, or the checkpoint cannot be resumed.
    """
    check_output_dir(options.training.output_dir)
    if os.environ.get(RESTARTED):
        _prefer_own_checkpoint(options.training)
    else:
        refuse_used_folder(options.training)
    checkpoint = checkpoint_to_resume(options.training)
    return saved_run(checkpoint) if checkpoint else None


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


def _prefer_own_checkpoint(arguments: Any) -> None:
    """Let a job that was queued again go on from its own last checkpoint; without one it begins as it first did."""
    job = os.environ.get("SLURM_JOB_ID")

    def has_own() -> bool:
        last = last_complete_checkpoint(arguments.output_dir)
        return last is not None and job_of(last) == job

    if on_first_rank(has_own):
        arguments.resume_from_checkpoint, arguments.overwrite_output_dir = "auto", False


def refuse_used_folder(arguments: Any) -> None:
    """Refuse a new run in a folder with checkpoints of another, or with files that no run wrote. Every rank must call.

    Raises:
        ValueError: on every rank; ``output_dir`` has checkpoints, and neither ``resume_from_checkpoint`` goes on from
            them nor ``overwrite_output_dir`` removes them, or both are given. Or it has files under the names of a
            run's results, and no run before.
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
    if not (goes_on and found) and (foreign := on_first_rank(lambda: _foreign_results(Path(output_dir)))):
        raise ValueError(
            f"output_dir={output_dir!r} has {', '.join(foreign)}, which this run would replace, and no {RUN_FILE} of "
            "an earlier run: give another --output_dir, or --overwrite_output_dir True to replace them"
        )


def _foreign_results(folder: Path) -> list[str]:
    """Return the files that a run would replace, if no earlier run can have written them."""
    if is_written_by_a_run(folder / RUN_FILE):
        return []
    names = (CARD_FILE, RUN_FILE, METRICS_FILE, PLOT_FILE, METHOD_PLOT_FILE, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    return [name for name in names if (folder / name).exists()]


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


def checkpoint_to_resume(arguments: Any) -> str | None:
    """Return the checkpoint folder of ``--resume_from_checkpoint``; None to start from the beginning.

    Raises:
        ValueError: the named folder is no complete checkpoint.

    Communication: one broadcast of a small object; every rank must call.
    """
    asked = arguments.resume_from_checkpoint
    if asked is None:
        return None
    try:
        checkpoint = on_first_rank(
            lambda: last_complete_checkpoint(arguments.output_dir) if asked == "auto" else _named_checkpoint(asked)
        )
    except ValueError as error:
        raise ValueError(f"resume_from_checkpoint={asked!r}: {error}") from error
    if checkpoint:
        tell(f"going on from {checkpoint}")
    return checkpoint


def require_training_state(saved: SavedRun) -> None:
    """Refuse a checkpoint without the optimizer's state. Every rank must call.

    Raises:
        ValueError: on every rank; the checkpoint was saved with ``save_only_model``.
    """
    # Trainer writes random states with the optimizer's and the schedule's, under every engine
    if not on_first_rank(lambda: any(Path(saved.folder).glob("rng_state*.pth"))):
        raise ValueError(
            f"{saved.folder} was saved with --save_only_model and has no state of the optimizer, so the run cannot go "
            "on from it: start a new one from its adapter (--model CHECKPOINT --output_dir ANOTHER)"
        )


def _named_checkpoint(folder: str) -> str:
    if not (Path(folder) / "trainer_state.json").is_file():
        raise ValueError(
            f"{folder} is no checkpoint (it has no trainer_state.json); name a checkpoint-N folder of an earlier run, "
            "or use auto"
        )
    require_complete(folder)
    return folder


def saved_run(checkpoint: str) -> SavedRun:
    """Return what a checkpoint says of its run. Every rank must call.

    Raises:
        ValueError: on every rank; the checkpoint's state is damaged.
    """
    return on_first_rank(lambda: saved_state(checkpoint))


def saved_state(checkpoint: str) -> SavedRun:
    """Return what a checkpoint says of its run, without communication.

    Raises:
        ValueError: the checkpoint's state is damaged.
    """
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
        try:
            return path.is_file() and read_json(path).get("steps") == saved.step
        except ValueError:  # an earlier release did not write it as a whole
            return False

    return on_first_rank(written)


def train(trainer: Any, options: Options, saved: SavedRun | None) -> None:
    """Train, unless the checkpoint has every step already: then load it only. Every rank must call."""
    if options.training.overwrite_output_dir:
        remove_checkpoints(options.training.output_dir)
    with raise_on_all_ranks("removing the metrics of the earlier run"):
        if is_first_rank():  # they would pass for this run's, and tell that its results are there
            (Path(options.training.output_dir) / METRICS_FILE).unlink(missing_ok=True)
    if saved is None:
        trainer.train()
        return
    options.training.leave_out_first_evaluation()
    if steps_are_done(saved, options.training):
        tell(f"all {saved.step} steps are done, nothing is trained; the results follow")
        trainer.add_callback(NoFurtherStep())
    try:
        trainer.train(resume_from_checkpoint=saved.folder)
    except StepsAreDone:
        _end_training(trainer)


def _end_training(trainer: Any) -> None:
    """Do what transformers does after the last step: load the best model, and tell the callbacks."""
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


def tell(text: str) -> None:
    """Print on the first rank."""
    if is_first_rank():
        print(text, flush=True)
