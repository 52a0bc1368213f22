"""The collectives of a step by themselves: recorded as they are issued, and issued again with nothing in between."""

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

_KINDS = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
_NEWER_KINDS = ("all_gather_single", "reduce_scatter_single")  # from torch 2.13 on


@dataclasses.dataclass(frozen=True)
class Collective:
    """One call, with tensors of its own in place of those it was made with."""

    kind: str
    payload_bytes: int  # of its first tensor
    dtype: str
    issue: Callable[[], Any]

    def as_dict(self) -> dict[str, Any]:
        """Without the call, JSON-ready."""
        return {"kind": self.kind, "payload_bytes": self.payload_bytes, "dtype": self.dtype}


@contextlib.contextmanager
def recorded() -> Iterator[list[Collective]]:
    """Collect the collectives that modules of reflora_dist call meanwhile; those of engines are not among them."""
    calls: list[Collective] = []
    originals = {kind: getattr(dist, kind) for kind in (*_KINDS, *_NEWER_KINDS) if hasattr(dist, kind)}

    def record(kind: str, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "reflora_dist":
            calls.append(_repeatable(kind, originals[kind], args, kwargs))
        return originals[kind](*args, **kwargs)

    try:
        for kind in originals:
            setattr(dist, kind, functools.partial(record, kind))
        yield calls
    finally:
        for kind, original in originals.items():
            setattr(dist, kind, original)


def _repeatable(kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Collective:
    args, kwargs = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, (args, kwargs))
    kwargs.pop("async_op", None)
    payload = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    size = payload.numel() * payload.element_size()
    dtype = str(payload.dtype).removeprefix("torch.")
    return Collective(kind, size, dtype, functools.partial(function, *args, **kwargs))


def issue_all(calls: Sequence[Collective]) -> None:
    """Issue the collectives again, one after the other. Every rank must call."""
    for call in calls:
        call.issue()
