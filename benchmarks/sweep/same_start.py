"""The check that runs of one seed begin alike, so that what differs later is the method's doing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from reflora_dist.methods.names import LATENT_METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS

CHECKED_STEPS = 3
# Runs of one seed compute the same up to the end of the warm-up, but some GPU kernels sum in any order.
CHECK_TOLERANCE = 1e-4
SCALED_TOLERANCE = 1e-2  # c A and B / c are rounded to bf16 otherwise than A and B, which moves the first loss by 3e-3


def plain_steps(method: str, warmup_steps: int) -> int:
    """Return the number of steps in which a method is still plain LoRA."""
    return 0 if method in METHOD_OPTIMIZERS else warmup_steps


def assert_same_start(runs: Sequence[dict[str, Any]], warmup_steps: int) -> None:
    """Check that all runs of a seed start with equal factors, batches and losses, and agree while they are plain LoRA.

    LoRA-SB and LoRA-XS start from another model, and share only the batches. Runs with another ``start_scale`` have
    other factors with the same product, so they share the first loss, but for rounding.

    Raises:
        AssertionError: two runs differ; the message names them.
    """
    seeds, starts, plain = defaultdict(list), defaultdict(list), defaultdict(list)
    for run in runs:
        starts[run["seed"], run["start_scale"]].append(run)
        if run["method"] not in LATENT_METHODS:
            seeds[run["seed"]].append(run)
            plain[run["seed"], run["start_scale"], run["alpha"], run["learning_rate"]].append(run)
    for first, *others in starts.values():
        for other in others:
            _assert_equal(first, other, "start_digest", first["start_digest"] == other["start_digest"])
    for first, *others in seeds.values():
        for other in others:
            x, y = (run["held_out_losses"][0] for run in (first, other))
            tolerance = CHECK_TOLERANCE if first["start_scale"] == other["start_scale"] else SCALED_TOLERANCE
            _assert_equal(first, other, "held_out_losses", _is_close(x, y, tolerance))
    for first, *others in plain.values():
        for other in others:
            # the loss at step w + 1 is the last that depends on w plain steps alone
            shared = min(plain_steps(run["method"], warmup_steps) for run in (first, other))
            count = min(shared, CHECKED_STEPS) + 1
            pairs = zip(first["train_losses"][:count], other["train_losses"][:count], strict=True)
            _assert_equal(first, other, "train_losses", all(_is_close(x, y) for x, y in pairs))


def _assert_equal(first: dict[str, Any], other: dict[str, Any], key: str, equal: bool) -> None:
    name, other_name = (f"{run['method']} (lr {run['learning_rate']:g}, seed {run['seed']})" for run in (first, other))
    assert equal, f"{name} and {other_name} differ in {key} before any method acts"


def _is_close(x: float | None, y: float | None, tolerance: float = CHECK_TOLERANCE) -> bool:
    if x is None or y is None:
        return x is y
    return math.isclose(x, y, rel_tol=tolerance)
