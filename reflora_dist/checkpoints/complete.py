"""The record of a complete HF Trainer checkpoint: every file's size, written after all other files.

    complete.json   {"files": {name: bytes}, "time": seconds, "job": SLURM's number or null}; in each of HF Trainer's
                    checkpoint folders, see CompleteCheckpoints

An interrupted save leaves no record. A truncated or lost file differs from the record. Checks read only the headers of
files, so tensors that the storage has corrupted go unnoticed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from ..collectives.ranks import is_first_rank, raise_on_all_ranks
from ..files.open_files import open_tensors, read_json
from ..files.records import file_sizes, read_record, require_files, require_zip, write_json
from .trainer_folders import checkpoint_folder

logger = logging.getLogger(__name__)

_RECORD = "complete.json"


class CompleteCheckpoints(TrainerCallback):
    """Marks Trainer's checkpoint as complete once every rank has written its part, and only then deletes older ones.

    Trainer itself deletes checkpoints beyond ``save_total_limit`` when the first rank is done, and resumes from the
    last folder even if it is incomplete. Resume with
    ``train(resume_from_checkpoint=last_complete_checkpoint(output_dir))`` instead. Add this callback after all
    callbacks that write into a checkpoint. All ranks must share the output folder.
    """

    def __init__(self) -> None:
        self._limit: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_total_limit is not None:
            self._limit, args.save_total_limit = args.save_total_limit, None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # An earlier run's checkpoint of this step loses its record before it is overwritten.
        may_be_best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        if is_first_rank() and (control.should_save or may_be_best):
            (checkpoint_folder(args, state) / _RECORD).unlink(missing_ok=True)

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best, ended = state.best_model_checkpoint, state.global_step >= state.max_steps  # before that it may be resumed
        if is_first_rank() and self._limit == 1 and best is not None and ended:
            # As Trainer does: the last checkpoint stays beside the best one only until training ends.
            for checkpoint in saved_checkpoints(checkpoint_folder(args, state).parent):
                if not os.path.samefile(checkpoint, best):
                    shutil.rmtree(checkpoint, ignore_errors=True)
        if self._limit is not None:
            args.save_total_limit, self._limit = self._limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record, then delete older checkpoints.

        Communication: two all-gathers of small objects.
        """
        folder = checkpoint_folder(args, state)
        with raise_on_all_ranks("saving the checkpoint"):
            pass  # waits until every rank has written its part
        with raise_on_all_ranks("completing the checkpoint"):
            self._name_best(args, state)
            if is_first_rank():
                written = {"time": time.time(), "job": os.environ.get("SLURM_JOB_ID")}
                write_json(folder / _RECORD, {"files": file_sizes(folder), **written})
                _remove_older(folder, self._limit, state.best_model_checkpoint)

    def _name_best(self, args: TrainingArguments, state: TrainerState) -> None:
        """Name the best checkpoint where Trainer has not.

        Trainer looks for its folder before a sharded engine has made that of the step, and ranks that then disagree
        wait for each other when training ends.
        """
        best = checkpoint_folder(args, state).with_name(f"checkpoint-{state.best_global_step}")
        if not state.best_global_step or state.best_model_checkpoint == str(best) or not best.is_dir():
            return
        state.best_model_checkpoint = str(best)
        if is_first_rank():
            state.save_to_json(str(checkpoint_folder(args, state) / TRAINER_STATE_NAME))


def numbered_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-N``, by N. Trainer's own list may have others, such as checkpoint-best."""
    numbers = {
        path: int(match[1])
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return sorted(numbers, key=numbers.__getitem__)


def saved_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return those of the folders ``checkpoint-N`` that hold a Trainer's state, by N."""
    return [
        checkpoint for checkpoint in numbered_checkpoints(output_dir) if (checkpoint / TRAINER_STATE_NAME).is_file()
    ]


def _remove_older(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond the limit, but neither the newest nor the best."""
    checkpoints = saved_checkpoints(newest.parent)
    # by time, because a run that was resumed from an earlier checkpoint may find later ones of its past
    checkpoints.sort(key=lambda checkpoint: int(checkpoint.stat().st_mtime))
    kept = {newest.resolve(), Path(best or newest).resolve()}
    removable = [checkpoint for checkpoint in checkpoints if checkpoint.resolve() not in kept]
    for checkpoint in removable[: max(0, len(checkpoints) - limit)] if limit is not None and limit > 0 else ():
        shutil.rmtree(checkpoint, ignore_errors=True)


def require_complete(folder: str | Path) -> None:
    """Refuse a Trainer checkpoint that is incomplete or was changed later.

    Raises:
        FileNotFoundError, ValueError: the record or a file is missing, or a file has another size or cannot be read;
            the message names the file.
    """
    record = Path(folder) / _RECORD
    if not record.is_file():
        raise FileNotFoundError(
            f"{folder} is no complete checkpoint: {_RECORD}, which is written last, is missing; name an earlier one"
        )
    require_files(folder, read_record(record, {})["files"])
    _require_openable(Path(folder))


def _require_openable(folder: Path) -> None:
    """Refuse damaged files of the right size, such as zeroed ones: the libraries' own errors name no file."""
    remedy = "it is damaged, name an earlier checkpoint"
    if (folder / TRAINER_STATE_NAME).is_file():
        read_json(folder / TRAINER_STATE_NAME, remedy)
    for path in folder.glob("*.safetensors"):
        with open_tensors(path, remedy):
            pass
    for pattern in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"):
        for path in folder.glob(pattern):
            require_zip(path)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last complete checkpoint of a run, or None. A warning names each later one and its problem.

    The last one has the highest number, unless another was written after it: then the run was resumed from an earlier
    checkpoint, and its work since counts.

    Local, no communication. Call it on one rank and send the others the result, since ranks may see the storage in
    different states.
    """
    last: Path | None = None
    for checkpoint in reversed(numbered_checkpoints(output_dir)):
        if last is not None and _time_of(checkpoint) <= _time_of(last):
            continue
        try:
            require_complete(checkpoint)
        except (OSError, ValueError) as error:
            logger.warning("passing over a checkpoint: %s", error)
            continue
        if last is not None:
            logger.warning("%s was written after %s, by a run that had been resumed before it", checkpoint, last.name)
        last = checkpoint
    return None if last is None else os.fspath(last)


def job_of(checkpoint: str | Path) -> str | None:
    """Return the number of the SLURM job that wrote a checkpoint, which stays when the job is queued again."""
    return read_json(Path(checkpoint) / _RECORD).get("job")


def _time_of(checkpoint: Path) -> float:
    """Return when a checkpoint was complete, in seconds; 0 if its record does not say."""
    try:
        return float(read_json(checkpoint / _RECORD).get("time", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return 0.0
