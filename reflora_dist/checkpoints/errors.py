"""Errors of torch and of engines while a checkpoint is written or read, raised again with a cause and a remedy."""

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
    """Raise write errors again with the rank and the free space, which torch does not name for a full disk.

    Raises:
        RuntimeError: the block raised OSError, RuntimeError or DCP's CheckpointException.
    """
    try:
        yield
    except CheckpointException as error:  # DCP raises it on every rank
        failures = {rank: failure[0] for rank, failure in error.failures.items()}
        raise RuntimeError(_write_error(folder, failures)) from error
    except (OSError, RuntimeError) as error:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        raise RuntimeError(_write_error(folder, {rank: error})) from error


@contextlib.contextmanager
def named_load_errors(folder: Path) -> Iterator[None]:
    """Raise load errors again with a remedy.

    DCP's CheckpointException derives from BaseException, so programs do not catch it. Engines' errors name a difference
    but not its reason.

    Raises:
        OSError, torch.OutOfMemoryError: as the block raised them.
        ValueError: a file is damaged.
        RuntimeError: the checkpoint does not fit this run.
    """
    try:
        yield
    except (CheckpointException, Exception) as error:  # CheckpointException is no Exception
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
    """Raise any error of DCP again as ValueError. Files alone are read here, so an error means a damaged checkpoint."""
    try:
        yield
    except (CheckpointException, Exception) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ValueError(_damaged(folder, cause)) from error


def _is_unreadable(cause: BaseException) -> bool:
    """Return whether the error comes from a damaged file rather than from another model's checkpoint."""
    from_archive = any(words in str(cause) for words in ("PytorchStreamReader", "hasRecord"))
    return from_archive or isinstance(cause, pickle.UnpicklingError | EOFError | UnicodeDecodeError)


def _damaged(folder: Path, cause: BaseException) -> str:
    return f"{folder} cannot be read ({cause_of(cause)}): it is damaged; load an earlier checkpoint"


def _write_error(folder: Path, failures: Mapping[int, BaseException]) -> str:
    causes = ", ".join(f"on rank {rank}: {type(error).__name__}: {error}" for rank, error in failures.items())
    free = shutil.disk_usage(folder).free / 2**20
    return f"saving the checkpoint to {folder}, with {free:,.1f} MiB free there, failed {causes}"
