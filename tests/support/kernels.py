"""What the tests of the kernels share, with and without a GPU."""

from __future__ import annotations

import random
from importlib import metadata

import pytest
import torch
from torch import Tensor

from reflora_dist.algebra.types import SIDE_A, SIDE_B, BlockSpec


def _triton_version() -> tuple[int, ...]:
    try:
        return tuple(map(int, metadata.version("triton").split(".")[:2]))
    except metadata.PackageNotFoundError:
        return ()


needs_interpreter = pytest.mark.skipif(
    _triton_version() < (3, 7), reason="needs Triton 3.7, whose interpreter is the first to loop with NumPy 2.4"
)
# The same terms in float64, summed in another order.
ROUNDING = 1e-13


def blocks_of_all_sizes(
    dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[list[BlockSpec], list[int], list[Tensor | None]]:
    """Blocks of every size that a program has to pad or cut, some absent, one beginning off a 16-byte boundary."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lora_ranks = [16, 16, 5, 32, 16, 64, 128, 8]
    specs: list[BlockSpec] = []
    blocks: list[Tensor | None] = []
    for pair, lora_rank in enumerate(lora_ranks):
        for side in (SIDE_A, SIDE_B):
            rows = rng.choice([1, 7, 33, 64, 130, 5000, 9001])
            columns = side == SIDE_A and pair % 3 > 0  # lora_A as PEFT stores it, or tall
            shape = (lora_rank, rows) if columns else (rows, lora_rank)
            specs.append(BlockSpec(pair, side, shape, columns))
            start = rng.choice([0, 0, 1])
            flat = torch.randn(start + lora_rank * rows, device=device, dtype=torch.float64).to(dtype)
            blocks.append(flat[start:].view(shape))
    specs.append(BlockSpec(0, SIDE_B, (1, 16), columns=False))  # a second block of one factor
    blocks.append(torch.randn(1, 16, device=device).to(dtype))
    blocks[3] = None
    return specs, lora_ranks, blocks
