"""Triton kernels for CUDA tensors: a bounded number of launches per step, whatever the number of adapters.

The plain torch code of ``blocks`` and ``refactor`` is their oracle, and what runs without a GPU or without Triton.
Triton's interpreter (``TRITON_INTERPRET=1``) runs every kernel on CPU tensors, which shows their arithmetic without a
GPU, but for ``scale_kernel`` on bfloat16: Triton 3.7's interpreter cannot round float64 to it. Nor does it compile,
check alignment, or have threads that could miss a barrier.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterable

import torch

_TOLERANCE = 1e-6  # one rounding to float32, and S to what Grams allow
_disabled = False


def disable() -> None:
    """Use the plain code from now on: on some rank the kernels do not work, and all ranks must round alike."""
    global _disabled
    _disabled = True


def usable(device: torch.device) -> bool:
    """Whether the kernels run on this device: NVIDIA's Ampere, Ada and Hopper.

    Triton 3.6 puts float64 products on the tensor cores of these; for Blackwell it fails, or spills every register.
    """
    return device.type == "cuda" and torch.version.cuda is not None and not _disabled and _supported(device)


@functools.cache
def _supported(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device)[0] in (8, 9)


def padded(lora_rank: int) -> int:
    """lora_rank rounded up to a power of two of at least 16, the least size of a product in Triton."""
    return max(16, 1 << (lora_rank - 1).bit_length())


LARGEST_LORA_RANK = 128  # more does not fit into the registers of one program
LARGEST_SOLVED_LORA_RANK = 64  # beyond, torch's batched routines are faster


def work(lora_ranks: Iterable[int], device: torch.device) -> bool:
    """Whether the kernels that a step needs agree with the plain code on this device; compiles them.

    Warns where one does not: training then goes on with the plain code, which is slower and as exact.
    """
    # what does not depend on r is checked with every r, so also where all of them are beyond the kernels
    sizes = sorted({min(lora_rank, LARGEST_LORA_RANK) for lora_rank in lora_ranks})
    return usable(device) and all(_agree_with_torch(lora_rank, device) for lora_rank in sizes)


@functools.cache
def _agree_with_torch(lora_rank: int, device: torch.device) -> bool:
    try:
        from .selfcheck import errors  # imports Triton, which not every machine has

        wrong = {what: error for what, error in errors(lora_rank, device).items() if not error < _TOLERANCE}  # or NaN
        reason = ", ".join(f"{what} differ by {error:.1e}" for what, error in wrong.items())
    except Exception as caught:  # whatever the compiler or the driver says, the plain code remains
        reason = f"{type(caught).__name__}: {caught}".splitlines()[0]
    if reason:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"kernels for r={lora_rank} are not used on {name}, plain torch code is: {reason}", stacklevel=2)
    return not reason
