"""Triton kernels for CUDA tensors: a bounded number of launches per step, whatever the number of adapters.

The plain torch code of ``tall_blocks`` and ``refactorization`` is their oracle, and replaces them if there is no GPU or
no Triton. Triton's interpreter (``TRITON_INTERPRET=1``) runs the kernels on CPU tensors, which tests their arithmetic
without a GPU. One case is missing: the interpreter of Triton 3.7 cannot round float64 to bfloat16 in ``scale_kernel``.
The interpreter does not compile, does not check alignment, and has no threads that could miss a barrier.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

_disabled = False


def disable() -> None:
    """Use the plain code from now on, because the kernels fail on some rank and all ranks must round alike."""
    global _disabled
    _disabled = True


def usable(device: torch.device) -> bool:
    """Return whether the kernels run on this device: an NVIDIA GPU of the Ampere, Ada or Hopper generation.

    Triton 3.6 computes float64 products on the tensor cores of these. For Blackwell it fails to compile, or spills
    every register.
    """
    return device.type == "cuda" and torch.version.cuda is not None and not _disabled and _supported(device)


@functools.cache
def _supported(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device)[0] in (8, 9)


def padded(lora_rank: int) -> int:
    """Return lora_rank rounded up to a power of two of at least 16, the smallest size of a product in Triton."""
    return max(16, 1 << (lora_rank - 1).bit_length())


LARGEST_LORA_RANK = 128  # a larger matrix does not fit into the registers of one program
LARGEST_SOLVED_LORA_RANK = 64  # torch's batched routines are faster for larger r
