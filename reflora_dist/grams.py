"""Summing partial Gram matrices over ranks: one all-reduce for all adapters."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .blocks import Matrices
from .communication import Communicator


def reduce_grams(local_grams: Matrices, communicator: Communicator) -> Matrices:
    """Sum every rank's partial Gram matrices.

    Args:
        local_grams: for every lora_rank r ``[2, P_r, r, r]`` float64, symmetric; ``X^T X`` over this rank's rows of
            each tall factor.
        communicator: over the ranks that together hold every row once.

    Returns:
        The sums, same shapes; bit-equal on all ranks, which therefore solve for the same S.

    Communication: one all-reduce of ``sum_r P_r r (r + 1)`` float64 values (upper triangles).
    """
    if communicator.world_size == 1:
        return local_grams
    triangles, indices = [], {}
    for lora_rank, grams in local_grams.items():
        indices[lora_rank] = _triangle(lora_rank, grams.device)
        triangles.append(grams.flatten(2).index_select(2, indices[lora_rank][0]))
    summed = communicator.all_reduce(triangles)
    return {
        lora_rank: triangle.index_select(2, indices[lora_rank][1]).view_as(grams)
        for (lora_rank, grams), triangle in zip(local_grams.items(), summed, strict=True)
    }


@functools.cache
def _triangle(lora_rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the upper triangle's elements lie in a matrix ``[r * r]``, and where each element lies in the triangle."""
    rows, columns = torch.triu_indices(lora_rank, lora_rank)
    whole = torch.empty(lora_rank, lora_rank, dtype=torch.int64)
    whole[rows, columns] = whole[columns, rows] = torch.arange(rows.numel())
    return (rows * lora_rank + columns).to(device), whole.flatten().to(device)
