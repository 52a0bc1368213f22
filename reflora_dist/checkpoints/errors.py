"""What torch and engines raise while a checkpoint is written or read, with what it takes to act on it."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from ..files.open_files import cause_of


@contextlib.contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """Say which rank could not write and how much space there is: torch tells neither of a full disk."""
    try:
        yield
    except CheckpointException as error:  # of DCP, on every rank alike
        failures = {rank: failure[0] for rank, failure in error.failures.items()}
        raise RuntimeError(_write_error(folder, failures)) from error
    except (OSError, RuntimeError) as error:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        raise RuntimeError(_write_error(folder, {rank: error})) from error


@contextlib.contextmanager
def named_load_errors(folder: Path) -> Iterator[None]:
    """Of DCP, whose exception is none that programs catch, and of engines, which say what differs but not why."""
    try:
        yield
    except (CheckpointException, Exception) as error:  # the first derives from BaseException
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, OSError | torch.OutOfMemoryError):
            raise cause from error
        if _is_unreadable(cause):
            raise ValueError(_damaged(folder, cause)) from error
        raise RuntimeError(
            f"{folder} does not fit this run ({type(cause).__name__}: {cause}): make the adapter, the optimizer and "
            "its groups as in the run that saved it, and learning-rate schedulers after loading"
        ) from error


@contextlib.contextmanager
def named_read_errors(folder: Path) -> Iterator[None]:
    """Of DCP where nothing but files is read: whatever it raises, the checkpoint is damaged."""
    try:
        yield
    except (CheckpointException, Exception) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ValueError(_damaged(folder, cause)) from error


def _is_unreadable(cause: BaseException) -> bool:
    """Whether a file is no archive of torch's (any more), rather than one of another model."""
    from_archive = any(words in str(cause) for words in ("PytorchStreamReader", "hasRecord"))
    return from_archive or isinstance(cause, pickle.UnpicklingError | EOFError | UnicodeDecodeError)


def _damaged(folder: Path, cause: BaseException) -> str:
    return f"{folder} cannot be read ({cause_of(cause)}): it is damaged; load an earlier checkpoint"


def _write_error(folder: Path, failures: Mapping[int, BaseException]) -> str:
    causes = ", ".join(f"on rank {rank}: {type(error).__name__}: {error}" for rank, error in failures.items())
    free = shutil.disk_usage(folder).free / 2**20
    return f"saving the checkpoint to {folder}, with {free:,.1f} MiB free there, failed {causes}"
