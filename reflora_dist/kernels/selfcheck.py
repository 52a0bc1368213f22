"""Before kernels are used on a device they must agree there with the plain code; Triton's support differs by GPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..blocks import SIDE_A, SIDE_B, BlockSet, BlockSpec
from ..refactor import CONVERGED, LARGEST_RESIDUAL, NEWTON_STEPS, RELATIVE_PIVOT, solve_with_torch
from .launch import solve

_TOLERANCE = 1e-6  # one rounding to float32, and S to what Grams allow


@functools.cache
def agree_with_torch(lora_rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Grams and products of this size are right on this device; compiles the kernels as it finds out.

    Warns where they are not: training then goes on with the plain code, which is slower and as exact.
    """
    return _agrees(f"Grams and products, r={lora_rank}", lambda: _block_error(lora_rank, dtype, device), device)


@functools.cache
def solve_agrees_with_torch(lora_rank: int, device: torch.device) -> bool:
    """The same for S."""
    return _agrees(f"S, r={lora_rank}", lambda: _solve_error(lora_rank, device), device)


def _agrees(what: str, measure: Callable[[], float], device: torch.device) -> bool:
    try:
        error = measure()
    except Exception as caught:  # whatever the compiler or the driver says, the plain code remains
        reason = f"{type(caught).__name__}: {caught}".splitlines()[0]
    else:
        if error < _TOLERANCE:
            return True
        reason = f"they differ by {error:.1e}"
    name = torch.cuda.get_device_name(device)
    warnings.warn(f"RefLoRA's kernels ({what}) are not used on {name}, plain torch code is: {reason}", stacklevel=2)
    return False


def _solve_error(lora_rank: int, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)
    factors = torch.randn(2, 3, 4 * lora_rank, lora_rank, dtype=torch.float64, device=device, generator=generator)
    factors[1, 2] = 0.0  # lora_B as PEFT starts it: no S
    gram_a, gram_b = factors.mT @ factors
    arguments = (NEWTON_STEPS, CONVERGED, RELATIVE_PIVOT, LARGEST_RESIDUAL)
    results = zip(solve(gram_a, gram_b, *arguments), solve_with_torch(gram_a, gram_b), strict=True)
    return max(_relative(value.double(), expected.double()) for value, expected in results)


def _block_error(lora_rank: int, dtype: torch.dtype, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)
    specs, blocks = [], []
    for pair, rows in enumerate((300, 4112)):  # off and on 16-byte boundaries, less and more than a program's share
        for side in (SIDE_A, SIDE_B):
            specs.append(BlockSpec(pair, side, (lora_rank, rows) if side == SIDE_A else (rows, lora_rank)))
            flat = torch.randn(lora_rank * rows + 1, dtype=dtype, device=device, generator=generator)
            blocks.append(flat[1 - pair :][: lora_rank * rows].view(specs[-1].shape))
    plain, fused = (BlockSet(specs, [lora_rank] * 2, device, use_kernels=use) for use in (False, True))
    expected, grams = plain.grams(blocks)[lora_rank], fused.grams(blocks)[lora_rank]
    copies = [block.clone() for block in blocks]
    left, right = {lora_rank: expected[0]}, {lora_rank: expected[1]}
    plain.multiply_(copies, left, right)
    fused.multiply_(blocks, left, right)
    return max(_relative(x, y) for x, y in zip([grams, *blocks], [expected, *copies], strict=True))


def _relative(value: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected))
