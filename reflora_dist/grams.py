"""Summing partial Gram matrices over ranks: one all-reduce for all adapters."""

from __future__ import annotations

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
        rows, columns = torch.triu_indices(lora_rank, lora_rank, device=grams.device)
        indices[lora_rank] = (rows, columns)
        triangles.append(grams[..., rows, columns])
    summed = communicator.all_reduce(triangles)
    return {
        lora_rank: _symmetric(triangle, *indices[lora_rank], lora_rank)
        for lora_rank, triangle in zip(local_grams, summed, strict=True)
    }


def _symmetric(triangle: Tensor, rows: Tensor, columns: Tensor, lora_rank: int) -> Tensor:
    grams = triangle.new_empty(*triangle.shape[:-1], lora_rank, lora_rank)
    grams[..., rows, columns] = triangle
    grams[..., columns, rows] = triangle
    return grams
