"""An error on one rank becomes an error on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def raise_on_all_ranks(action: str) -> Iterator[None]:
    """Return a context whose error on one rank is raised on all ranks; its end is a barrier.

    Args:
        action: name of the action, for the message on ranks without an error of their own.

    Raises:
        Exception: this rank's own error.
        RuntimeError: another rank failed; the message names the rank and its error.

    Communication: one all-gather of objects over all ranks.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if world_size() > 1:
        messages: list[str | None] = [None] * world_size()
        dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
        for rank, message in enumerate(messages):
            if message is not None and error is None:
                raise RuntimeError(f"{action} failed on rank {rank}: {message}")
    if error is not None:
        raise error


def is_first_rank() -> bool:
    """Return whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    """Return the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1
