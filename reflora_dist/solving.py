"""From partial Gram matrices to a Transform: every rank solves for all pairs, or for its share of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable

import torch

from . import kernels
from .blocks import Matrices
from .communication import Communicator
from .grams import from_triangles, reduce_grams, triangles
from .methods.base import Transform

Solve = Callable[[Matrices], Transform]
"""``GradientMethod.solve``."""


def worth_dividing(lora_ranks: Iterable[int], device: torch.device) -> bool:
    """Whether the solve is worth a further exchange: not if one kernel, which fewer pairs make no faster, does it."""
    return not kernels.usable(device) or max(lora_ranks) > kernels.LARGEST_SOLVED_LORA_RANK


def solve_everywhere(local_grams: Matrices, solve: Solve, communicator: Communicator) -> tuple[Matrices, Transform]:
    """Sum the Grams over ranks; every rank solves for all pairs.

    Args:
        local_grams: for every lora_rank r ``[2, P_r, r, r]`` float64, over this rank's rows.
        solve: the same on all ranks, to the last bit.
        communicator: over the ranks that together hold every row once.

    Returns:
        The Grams of the whole factors, and what they solve to.

    Communication: that of :func:`reflora_dist.grams.reduce_grams`.
    """
    grams = reduce_grams(local_grams, communicator)
    return grams, solve(grams)


def solve_divided(local_grams: Matrices, solve: Solve, communicator: Communicator) -> tuple[Matrices, Transform]:
    """Likewise, but each pair's Grams go to one rank, which sums them, solves, and sends all ranks what it has.

    Args:
        solve: of a method that is ``divisible``.

    Communication: two all-to-alls of float64 values. A rank sends ``r (r + 1)`` of every pair of other ranks, then
    ``2 r (r + 1) + 1`` of each of its own pairs to every other rank.
    """
    sizes = share_sizes(tuple((r, grams.shape[1]) for r, grams in local_grams.items()), communicator.world_size)
    halves = {r: triangles(grams).transpose(0, 1).flatten(1) for r, grams in local_grams.items()}
    sums = {r: of_ranks.sum(dim=0) for r, of_ranks in _to_owners(halves, sizes, communicator).items()}
    own_grams = {
        r: from_triangles(both.unflatten(1, (2, -1)).transpose(0, 1), r) for r, both in sums.items() if both.numel()
    }
    transform = solve(own_grams)
    rows = {}
    for r, both in sums.items():
        if r in own_grams:
            solution = [triangles(transform.left[r]), triangles(transform.right[r])]
            rows[r] = torch.cat([both, *solution, transform.solved[r].to(both.dtype)[:, None]], dim=1)
        else:
            rows[r] = both.new_empty(0, 2 * both.shape[1] + 1)
    grams, whole = {}, Transform({}, {}, {})
    for r, values in _to_all(rows, sizes, communicator).items():
        matrices = from_triangles(values[:, :-1].unflatten(1, (4, -1)).transpose(0, 1), r)
        grams[r], (whole.left[r], whole.right[r]) = matrices[:2], matrices[2:]
        whole.solved[r] = values[:, -1] > 0
    return grams, whole


@functools.cache
def share_sizes(num_pairs: tuple[tuple[int, int], ...], world_size: int) -> dict[int, list[int]]:
    """How many pairs each rank solves for: neighbours in the order of lora_ranks, as many on each, give or take one.

    Args:
        num_pairs: ``(r, P_r)`` of every lora_rank.

    Returns:
        ``{r: [pairs of the first rank, of the second, ...]}``.
    """
    total = sum(count for _, count in num_pairs)
    bounds = [total * rank // world_size for rank in range(world_size + 1)]
    sizes, start = {}, 0
    for r, count in num_pairs:
        places = [min(max(bound - start, 0), count) for bound in bounds]
        sizes[r] = [stop - first for first, stop in itertools.pairwise(places)]
        start += count
    return sizes


def _to_owners(rows: Matrices, sizes: dict[int, list[int]], communicator: Communicator) -> Matrices:
    """``{r: [P_r, width]}``, every pair's row to its rank; returns ``{r: [ranks, own pairs, width]}``."""
    world_size, rank = communicator.world_size, communicator.rank
    split = [values.split(sizes[r]) for r, values in rows.items()]
    counts = _counts(rows, sizes, world_size)
    send = torch.cat([of_lora_rank[other].reshape(-1) for other in range(world_size) for of_lora_rank in split])
    arrived = communicator.all_to_all(send, counts, [counts[rank]] * world_size).view(world_size, -1)
    parts = arrived.split([sizes[r][rank] * values.shape[1] for r, values in rows.items()], dim=1)
    return {
        r: part.unflatten(1, (sizes[r][rank], values.shape[1]))
        for (r, values), part in zip(rows.items(), parts, strict=True)
    }


def _to_all(rows: Matrices, sizes: dict[int, list[int]], communicator: Communicator) -> Matrices:
    """``{r: [own pairs, width]}``, to every rank; returns ``{r: [P_r, width]}``."""
    world_size = communicator.world_size
    own = torch.cat([values.reshape(-1) for values in rows.values()])
    arrived = communicator.all_to_all(
        own.repeat(world_size), [own.numel()] * world_size, _counts(rows, sizes, world_size)
    )
    parts = arrived.split(
        [sizes[r][rank] * values.shape[1] for rank in range(world_size) for r, values in rows.items()]
    )
    return {
        r: torch.cat(parts[place :: len(rows)]).view(-1, values.shape[1])
        for place, (r, values) in enumerate(rows.items())
    }


def _counts(rows: Matrices, sizes: dict[int, list[int]], world_size: int) -> list[int]:
    """Elements of every rank's share."""
    return [sum(sizes[r][rank] * values.shape[1] for r, values in rows.items()) for rank in range(world_size)]
