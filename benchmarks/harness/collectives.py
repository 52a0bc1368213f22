"""Record the collectives of a step, and issue them again with nothing in between."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from reflora_dist.collectives import communicator as communication

_KINDS = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
_NEWER_KINDS = ("all_gather_single", "reduce_scatter_single")  # from torch 2.13 on
_MESSAGES = "batch_isend_irecv"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A recorded call, with tensors of its own."""

    kind: str
    payload_bytes: int  # size of its first tensor
    dtype: str
    issue: Callable[[], Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields without the call, JSON-ready."""
        return {"kind": self.kind, "payload_bytes": self.payload_bytes, "dtype": self.dtype}


@contextlib.contextmanager
def recorded() -> Iterator[list[Collective]]:
    """Record the collectives that modules of reflora_dist call, but not those of engines."""
    calls: list[Collective] = []

    def record(kind: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "reflora_dist":
            make = _repeatable_messages if kind == _MESSAGES else _repeatable
            calls.append(make(kind, original, args, kwargs))
        return original(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for kind in (*_KINDS, *_NEWER_KINDS, _MESSAGES):
            if (original := getattr(dist, kind, None)) is not None:
                stack.enter_context(_replaced(dist, kind, functools.partial(record, kind, original)))
        # the module looks this function up when it is imported
        gather = communication._all_gather
        stack.enter_context(_replaced(communication, "_all_gather", functools.partial(record, gather.__name__, gather)))
        yield calls


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _repeatable(kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Collective:
    args, kwargs = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, (args, kwargs))
    kwargs.pop("async_op", None)
    payload = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    size = payload.numel() * payload.element_size()
    dtype = str(payload.dtype).removeprefix("torch.")
    return Collective(kind, size, dtype, functools.partial(function, *args, **kwargs))


def _repeatable_messages(
    kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Collective:
    """Make a repeatable call of point-to-point messages. The payload is what this rank sends."""
    (operations,) = args
    repeated = [
        dist.P2POp(
            operation.op, torch.zeros_like(operation.tensor), group=operation.group, group_peer=operation.group_peer
        )
        for operation in operations
    ]
    sent = [operation.tensor for operation in operations if operation.op is dist.isend]

    def issue() -> None:
        for request in function(repeated):
            request.wait()

    size = sum(tensor.numel() * tensor.element_size() for tensor in sent)
    dtype = str(operations[0].tensor.dtype).removeprefix("torch.")
    return Collective(kind, size, dtype, issue)


def issue_all(calls: Sequence[Collective]) -> None:
    """Issue the collectives again, one after the other. Every rank must call."""
    for call in calls:
        call.issue()
