"""Time the phases of a RefLoRA step with timers around the functions that do the work.

The timers wait for the device, so a phase is longer than in an undisturbed step. Compare phases only with each other.
``PHASES`` names the functions of RefLoRA, and ``BASELINE_PHASES`` those of the baselines. Nothing else here depends on
these names. The phases of a step depend on the layout. Cut rows and a flat lora_A are exchanged. Gram matrices are
summed in an all-reduce. Where the solve is expensive, the ranks' solutions are gathered.
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
    """Add up milliseconds by phase while the context is open. A phase does not include the phases inside it.

    Raises:
        RuntimeError: a function of ``phases`` (default: PHASES) does not exist.
    """
    phases = PHASES if phases is None else phases
    elapsed_ms: dict[str, float] = {}
    inner_ms: list[float] = []  # for each open phase the time of the phases inside it

    def timed(phase: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if phase == "exchange" and not args[0].takes_part:
            return function(*args, **kwargs)  # nothing is exchanged
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
    """Find ``package.module:Class.function``. Return its owner, its name there, and the function."""
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
