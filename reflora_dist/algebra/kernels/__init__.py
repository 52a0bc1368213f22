"""Triton kernels for CUDA tensors: a bounded number of launches per step, whatever the number of adapters.

The plain torch code of ``tall_blocks`` and ``refactorization`` is their oracle, and runs where there is no GPU or no
Triton. Triton's interpreter (``TRITON_INTERPRET=1``) runs every kernel on CPU tensors. That shows their arithmetic
without a GPU, but for ``scale_kernel`` on bfloat16: the interpreter of Triton 3.7 cannot round float64 to it. It
does not compile, does not check alignment, and has no threads that could miss a barrier.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

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
