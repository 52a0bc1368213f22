"""Kernels are used on a device only if they agree there with the plain code; Triton's support differs by GPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

import torch

from .kernels import LARGEST_LORA_RANK, usable

_TOLERANCE = 1e-6  # one rounding to float32, and S to what Grams allow


def kernels_work(lora_ranks: Iterable[int], device: torch.device) -> bool:
    """Whether the kernels that a step needs agree with the plain code on this device; compiles them.

    Warns where one does not: training then goes on with the plain code, which is slower and as exact.
    """
    # what does not depend on r is checked with every r, so also where all of them are beyond the kernels
    sizes = sorted({min(lora_rank, LARGEST_LORA_RANK) for lora_rank in lora_ranks})
    return usable(device) and all(_agree_with_torch(lora_rank, device) for lora_rank in sizes)


@functools.cache
def _agree_with_torch(lora_rank: int, device: torch.device) -> bool:
    try:
        from .kernel_errors import errors  # imports Triton, which not every machine has

        wrong = {what: error for what, error in errors(lora_rank, device).items() if not error < _TOLERANCE}  # or NaN
        reason = ", ".join(f"{what} differ by {error:.1e}" for what, error in wrong.items())
    except Exception as caught:  # whatever the compiler or the driver says, the plain code remains
        reason = f"{type(caught).__name__}: {caught}".splitlines()[0]
    if reason:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"kernels for r={lora_rank} are not used on {name}, plain torch code is: {reason}", stacklevel=2)
    return not reason
