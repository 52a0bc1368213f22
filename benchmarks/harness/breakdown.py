"""Where the time of a RefLoRA step goes, phase by phase, by timers around the functions that do the work.

The timers wait for the device, so a phase is longer than in an undisturbed step; the parts are for comparison with each
other. ``PHASES`` names the functions, ``BASELINE_PHASES`` those of what RefLoRA is measured against; there is nothing
else to adapt when they change. Which phases a step has depends on the layout: rows that are cut, or a flat lora_A, are
exchanged; Grams are summed in an all-reduce; and where the solve is dear, what ranks solved is gathered.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

PHASES = {
    "grams": ("reflora_dist.algebra.tall_blocks:BlockSet.grams",),
    # there and back, with packing and unpacking
    "exchange": (
        "reflora_dist.collectives.exchange:Exchange.forward",
        "reflora_dist.collectives.exchange:Exchange.backward",
    ),
    "all_reduce": ("reflora_dist.collectives.communicator:Communicator.all_reduce",),
    "all_gather": ("reflora_dist.collectives.communicator:Communicator.all_gather",),
    "solve": ("reflora_dist.methods.reflora:RefLoRA.solve",),
    "apply": ("reflora_dist.algebra.tall_blocks:BlockSet.multiply_",),
}

# with the packing before and the unpacking after, as in "exchange"
BASELINE_PHASES = {"gather": ("benchmarks.harness.baselines:GatheredPairs.gather",)}


@contextlib.contextmanager
def timed_phases(device: torch.device, phases: Mapping[str, Sequence[str]] | None = None) -> Iterator[dict[str, float]]:
    """Add up milliseconds by phase meanwhile, of those that occur. What is inside another phase is not counted in it.

    Raises:
        RuntimeError: a function of ``phases`` (PHASES) does not exist.
    """
    phases = PHASES if phases is None else phases
    elapsed_ms: dict[str, float] = {}
    inner_ms: list[float] = []  # by open phase, the time of the phases inside it

    def timed(phase: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if phase == "exchange" and not args[0].takes_part:
            return function(*args, **kwargs)  # of nothing
        start = _now(device)
        inner_ms.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            total = 1e3 * (_now(device) - start)
            elapsed_ms[phase] = elapsed_ms.get(phase, 0.0) + total - inner_ms.pop()
            if inner_ms:
                inner_ms[-1] += total

    with contextlib.ExitStack() as stack:
        for phase, paths in phases.items():
            for path in paths:
                stack.enter_context(_replaced(path, functools.partial(timed, phase)))
        yield elapsed_ms


@contextlib.contextmanager
def _replaced(path: str, around: Callable[..., Any]) -> Iterator[None]:
    owner, name, function = _find(path)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, function)


def _find(path: str) -> tuple[Any, str, Callable[..., Any]]:
    """``package.module:Class.function``: what holds it, its name there, and the function."""
    module, _, qualified = path.partition(":")
    *outer, name = qualified.split(".")
    try:
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        return owner, name, getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{path} does not exist; adapt PHASES of benchmarks/harness/breakdown.py") from error


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
