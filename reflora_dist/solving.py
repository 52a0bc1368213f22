"""From partial Gram matrices to a Transform: every rank solves for all pairs, or for its share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
    shares = _Shares({lora_rank: grams.shape[1] for lora_rank, grams in local_grams.items()}, communicator)
    partial = shares.to_owners({r: triangles(grams).transpose(0, 1).flatten(1) for r, grams in local_grams.items()})
    sums = {r: of_ranks.sum(dim=0) for r, of_ranks in partial.items() if of_ranks.shape[1]}
    transform = solve({r: from_triangles(both.unflatten(1, (2, -1)).transpose(0, 1), r) for r, both in sums.items()})
    solutions = {}
    for r, partial_r in partial.items():
        solutions[r] = partial_r.new_empty(0, 2 * partial_r.shape[2] + 1)
        if r in sums:
            left, right, solved = triangles(transform.left[r]), triangles(transform.right[r]), transform.solved[r]
            solutions[r] = torch.cat([sums[r], left, right, solved.to(sums[r].dtype)[:, None]], dim=1)
    grams, whole = {}, Transform({}, {}, {})
    for r, rows in shares.to_all(solutions).items():
        gram_a, gram_b, left, right = from_triangles(rows[:, :-1].unflatten(1, (4, -1)).transpose(0, 1), r)
        grams[r] = torch.stack([gram_a, gram_b])
        whole.left[r], whole.right[r], whole.solved[r] = left, right, rows[:, -1] > 0
    return grams, whole


class _Shares:
    """The pairs that each rank solves for: neighbours of one lora_rank, as many on every rank, give or take one.

    Args:
        num_pairs: of every lora_rank.
        communicator: carries the exchanges.
    """

    def __init__(self, num_pairs: Mapping[int, int], communicator: Communicator) -> None:
        self._comm = communicator
        ranks = range(communicator.world_size)
        self._sizes = {
            r: [count * (rank + 1) // len(ranks) - count * rank // len(ranks) for rank in ranks]
            for r, count in num_pairs.items()
        }

    def to_owners(self, rows: Matrices) -> Matrices:
        """``{r: [P_r, width]}``, every pair's row to its rank; returns ``{r: [ranks, own pairs, width]}``."""
        split = {r: values.split(self._sizes[r]) for r, values in rows.items()}
        by_rank = [split[r][rank].reshape(-1) for rank in range(self._comm.world_size) for r in rows]
        counts = self._counts(rows)
        own = counts[self._comm.rank]
        arrived = self._comm.all_to_all(torch.cat(by_rank), counts, [own] * self._comm.world_size)
        shapes = {r: (self._sizes[r][self._comm.rank], values.shape[-1]) for r, values in rows.items()}
        parts = arrived.view(self._comm.world_size, own).split([a * b for a, b in shapes.values()], dim=1)
        return {r: part.unflatten(1, shape) for (r, shape), part in zip(shapes.items(), parts, strict=True)}

    def to_all(self, own: Matrices) -> Matrices:
        """``{r: [own pairs, width]}``, to every rank; returns ``{r: [P_r, width]}``."""
        counts = self._counts(own)
        flat = torch.cat([rows.reshape(-1) for rows in own.values()])
        arrived = self._comm.all_to_all(flat.repeat(len(counts)), [flat.numel()] * len(counts), counts)
        sizes = [self._sizes[r][rank] * own[r].shape[-1] for rank in range(len(counts)) for r in own]
        parts = arrived.split(sizes)
        return {
            r: torch.cat(parts[place :: len(own)]).view(-1, rows.shape[-1])
            for place, (r, rows) in enumerate(own.items())
        }

    def _counts(self, rows: Matrices) -> list[int]:
        """Elements of every rank's share."""
        return [
            sum(self._sizes[r][rank] * values.shape[-1] for r, values in rows.items())
            for rank in range(self._comm.world_size)
        ]
