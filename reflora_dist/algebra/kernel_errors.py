"""Differences between the Triton kernels and the plain code on a device. Needs Triton, which not every machine has."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .decompositions import CONVERGED, NEWTON_STEPS, RELATIVE_PIVOT
from .kernels import LARGEST_SOLVED_LORA_RANK
from .kernels.launch import invert, solve
from .refactorization import LARGEST_RESIDUAL, solve_with_torch
from .tall_blocks import BlockSet
from .tensor_lists import PerTensor
from .types import SIDE_A, SIDE_B, BlockSpec


def errors(lora_rank: int, device: torch.device) -> dict[str, float]:
    """Return the largest relative difference between kernels and plain code, by the name of the result.

    Args:
        lora_rank: r of the matrices and blocks to compare.
        device: the CUDA device, or the CPU for Triton's interpreter.
    """
    found = {
        "Grams and products": block_error(lora_rank, device, aligned=True),
        "Grams and products of unaligned blocks": block_error(lora_rank, device, aligned=False),
        "inverses": inverse_error(lora_rank, device),
        "sums and products per tensor": per_tensor_error(device),
    }
    if lora_rank <= LARGEST_SOLVED_LORA_RANK:
        found["S"] = solve_error(lora_rank, device)
    return found


def block_error(lora_rank: int, device: torch.device, aligned: bool) -> float:
    """Return the largest relative difference in Grams and products.

    Args:
        lora_rank: r of both pairs.
        device: device of the blocks.
        aligned: whether blocks begin on 16-byte boundaries.
    """
    generator = torch.Generator(device).manual_seed(0)
    offset = 0 if aligned else 1
    specs, blocks = [], []
    for pair, rows in enumerate((304, 4112)):  # fewer and more rows than one program takes
        for side, columns in ((SIDE_A, True), (SIDE_A, False), (SIDE_B, False)):
            specs.append(BlockSpec(pair, side, (lora_rank, rows) if columns else (rows, lora_rank), columns))
            flat = torch.randn(lora_rank * rows + 1, dtype=torch.float32, device=device, generator=generator)
            blocks.append(flat[offset:][: lora_rank * rows].view(specs[-1].shape))
    plain, fused = (BlockSet(specs, [lora_rank] * 2, device, use_kernels=use) for use in (False, True))
    expected, grams = plain.grams(blocks)[lora_rank], fused.grams(blocks)[lora_rank]
    copies = [block.clone() for block in blocks]
    # not symmetric, so that a product with the transpose would be found
    matrices = torch.randn(2, 2, lora_rank, lora_rank, dtype=torch.float64, device=device, generator=generator)
    plain.multiply_(copies, {lora_rank: matrices})
    fused.multiply_(blocks, {lora_rank: matrices})
    return _largest([_relative(x, y) for x, y in zip([grams, *blocks], [expected, *copies], strict=True)])


def solve_error(lora_rank: int, device: torch.device) -> float:
    """Return the largest relative difference in S, in its inverse, and in the flags of solved pairs."""
    generator = torch.Generator(device).manual_seed(0)
    factors = torch.randn(2, 3, 4 * lora_rank, lora_rank, dtype=torch.float64, device=device, generator=generator)
    factors[1, 2] = 0.0  # PEFT's initial lora_B: S does not exist
    gram_a, gram_b = factors.mT @ factors
    results = solve(gram_a, gram_b, NEWTON_STEPS, CONVERGED, RELATIVE_PIVOT, LARGEST_RESIDUAL)
    expected = solve_with_torch(gram_a.cpu(), gram_b.cpu())  # on a GPU it would invert with a kernel
    errors = [_relative(x.cpu().double(), y.double()) for x, y in zip(results, expected, strict=True)]
    return _largest(errors)


def inverse_error(lora_rank: int, device: torch.device) -> float:
    """Return the largest relative difference in inverses."""
    generator = torch.Generator(device).manual_seed(0)
    matrices = torch.randn(3, lora_rank, lora_rank, dtype=torch.float64, device=device, generator=generator)
    return _relative(invert(matrices), torch.linalg.inv(matrices))


@functools.cache
def per_tensor_error(device: torch.device) -> float:
    """Return the largest relative difference in sums over tensors, and in products of tensors with numbers."""
    generator = torch.Generator(device).manual_seed(0)
    sizes, dtype = (7, 40_000, 1024, 200, 200), torch.float32
    tensors = [torch.randn(n, dtype=dtype, device=device, generator=generator)[n % 2 :] for n in sizes]
    tensors[3:] = tensors[3].bfloat16(), tensors[4].half()
    on_the_host, ours = PerTensor(torch.device("cpu")), PerTensor(device)
    copies = [tensor.cpu() for tensor in tensors]
    factors = torch.tensor([3.0, 1e-3, -2.0, 0.5, -2.0], dtype=torch.float64)  # last two: exact in 16 bits
    results = [ours.magnitudes(tensors), ours.squares(tensors)]
    expected = [on_the_host.magnitudes(copies), on_the_host.squares(copies)]
    ours.scale_("tensors", tensors, factors.to(device))
    on_the_host.scale_("tensors", copies, factors)
    pairs = zip([*results, *tensors], [*expected, *copies], strict=True)
    return _largest([_relative(value.double(), other.to(device).double()) for value, other in pairs])


def _largest(errors: list[float]) -> float:
    """Return the maximum, or NaN if any value is NaN; Python's max() may ignore NaN."""
    return float(torch.tensor(errors).max())


def _relative(value: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected))
