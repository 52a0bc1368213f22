"""Check that the Triton kernels agree with the plain torch code on a device; Triton's support differs by GPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

import torch

from .kernels import LARGEST_LORA_RANK, usable

_TOLERANCE = 1e-6  # relative; covers one rounding to float32, and the accuracy of S from Gram matrices


def kernels_work(lora_ranks: Iterable[int], device: torch.device) -> bool:
    """Compile the kernels that a step needs, and return whether all agree with the plain code on this device.

    Warns if one does not. Training then continues with the plain code, which is slower and equally exact.
    """
    # clamped, not filtered: the kernels that do not depend on r must be checked even if every r is too large
    sizes = sorted({min(lora_rank, LARGEST_LORA_RANK) for lora_rank in lora_ranks})
    return usable(device) and all(_agree_with_torch(lora_rank, device) for lora_rank in sizes)


@functools.cache
def _agree_with_torch(lora_rank: int, device: torch.device) -> bool:
    try:
        from .kernel_errors import errors  # imports Triton, which not every machine has

        wrong = {what: error for what, error in errors(lora_rank, device).items() if not error < _TOLERANCE}  # or NaN
        reason = ", ".join(f"{what} differ by {error:.1e}" for what, error in wrong.items())
    except Exception as caught:  # the compiler and the driver raise errors of many types; the plain code remains
        reason = f"{type(caught).__name__}: {caught}".splitlines()[0]
    if reason:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"kernels for r={lora_rank} are not used on {name}, plain torch code is: {reason}", stacklevel=2)
    return not reason
