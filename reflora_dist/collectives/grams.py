"""Sums of partial Gram matrices over ranks, with one all-reduce for all adapters, which sends upper triangles."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.types import Matrices
from .communicator import Communicator


def reduce_grams(local_grams: Matrices, communicator: Communicator) -> Matrices:
    """Sum every rank's partial Gram matrices.

    Args:
        local_grams: for every lora_rank r ``[2, P_r, r, r]`` float64, symmetric: ``X^T X`` over this rank's rows of
            each tall factor. For k tall matrices side by side, ``[2, P_r, k r, k r]``.
        communicator: spans the ranks that together hold every row once.

    Returns:
        The sums, in the same shapes. They are bit-equal on all ranks, which therefore compute the same S.

    Communication: one all-reduce of ``sum_r P_r r (r + 1)`` float64 values (upper triangles).
    """
    return reduce_grams_and(local_grams, [], communicator)[0]


def reduce_grams_and(
    local_grams: Matrices, others: Sequence[Tensor], communicator: Communicator
) -> tuple[Matrices, list[Tensor]]:
    """Sum partial Gram matrices as :func:`reduce_grams` does, and other float64 tensors in the same all-reduce.

    Returns:
        The sums of the Gram matrices, and the sums of ``others``, in the same shapes.
    """
    if communicator.world_size == 1:
        return local_grams, list(others)
    halves = [triangles(grams) for grams in local_grams.values()]
    summed = communicator.all_reduce([*halves, *others])
    matrices = {
        lora_rank: from_triangles(half, grams.shape[-1])
        for (lora_rank, grams), half in zip(local_grams.items(), summed[: len(halves)], strict=True)
    }
    return matrices, summed[len(halves) :]


def triangles(matrices: Tensor) -> Tensor:
    """Return the upper triangles ``[..., r (r + 1) / 2]`` of symmetric matrices ``[..., r, r]``."""
    index, _ = _triangle(matrices.shape[-1], matrices.device)
    return matrices.flatten(-2).index_select(-1, index)


def from_triangles(halves: Tensor, size: int) -> Tensor:
    """Return the symmetric matrices ``[..., size, size]`` with the given upper triangles."""
    _, index = _triangle(size, halves.device)
    return halves.gather(-1, index.expand(*halves.shape[:-1], -1)).unflatten(-1, (size, size))


@functools.cache
def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two int64 indices for r = ``size``.

    The first ``[r (r + 1) / 2]`` gives the place in a flat matrix of each element of the upper triangle. The second
    ``[r * r]`` gives the place in the triangle of each element of the matrix.
    """
    rows, columns = torch.triu_indices(size, size)
    whole = torch.empty(size, size, dtype=torch.int64)
    whole[rows, columns] = whole[columns, rows] = torch.arange(rows.numel())
    return (rows * size + columns).to(device), whole.flatten().to(device)
