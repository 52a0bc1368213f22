"""The solve for a method's matrices from summed Gram matrices, by every rank for all pairs or for its share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..algebra.types import Matrices
from ..collectives.communicator import Communicator
from ..collectives.grams import from_triangles, triangles
from ..methods.base import MatrixMethod, Transform
from ..methods.config import RefLoRAConfig

# Above this sum of r^3 over pairs, a solve takes longer than an all-gather of its results. Measured: on an H200, 2.1 ms
# for the 224 pairs of LLaMA-7B with r = 64 and 0.5 ms with r = 32; on a CPU core, 6 ms for 56 pairs with r = 32.
_DEAR_WORK = {"cpu": 1e6}
_DEAR_WORK_ELSEWHERE = 2e7
# The root of float32's largest number. A factor that is smaller than the other by this ratio counts as zero.
_LARGEST_ENTRY = 1e19
_LEAST_SHARE = 4  # pairs per rank; a rank solves fewer pairs itself as fast as it would wait for others


class Solver:
    """Solves for the matrices that a method applies to the gradients or factors, on all ranks together.

    Ranks share the pairs out if their solve is expensive (``r^3`` summed over pairs) and every rank gets at least four
    pairs. Otherwise every rank solves for all pairs. All ranks decide alike.

    Communication per call: one all-gather of the matrices if pairs are shared out (upper triangles if they are
    symmetric), otherwise none.

    Args:
        kind: the method's class.
        config: the method's settings.
        scalings: s of every pair's update ``s B A``.
        lora_ranks: r of every pair.
        communicator: made for the ranks that have the same Gram matrices.
        hopeless: numbers of the pairs for which the method does not exist: they count as unsolved, whatever their Gram
            matrices are.
    """

    def __init__(
        self,
        kind: type[MatrixMethod],
        config: RefLoRAConfig,
        scalings: Sequence[float],
        lora_ranks: Sequence[int],
        communicator: Communicator,
        hopeless: Collection[int] = (),
    ) -> None:
        self._comm = communicator
        by_rank: dict[int, list[float]] = {}
        for r, scaling in zip(lora_ranks, scalings, strict=True):
            by_rank.setdefault(r, []).append(scaling)
        self._counts = {r: len(values) for r, values in by_rank.items()}
        device = communicator.device
        of_pairs = {r: torch.tensor(values, dtype=torch.float64, device=device) for r, values in by_rank.items()}
        self._symmetric = kind.symmetric
        self.shared_out = shares_out(lora_ranks, communicator.world_size, device)
        self._own: dict[int, slice] = {}
        for r, count in self._counts.items():
            share = -(-count // communicator.world_size) if self.shared_out else count
            first = min(communicator.rank * share, count) if self.shared_out else 0
            self._own[r] = slice(first, min(first + share, count))
        self._method = kind(config, {r: values[self._own[r]] for r, values in of_pairs.items()})
        flags: dict[int, list[bool]] = {}
        for pair, r in enumerate(lora_ranks):
            flags.setdefault(r, []).append(pair not in hopeless)
        self._may_be_solved = {r: torch.tensor(values, device=device) for r, values in flags.items()}

    def __call__(self, grams: Matrices) -> Transform:
        """Return the matrices by which every pair's gradients or factors are to be multiplied.

        Args:
            grams: ``{r: [2, P_r, k r, k r]}`` float64, the same bits on every rank; k is 1, or more for a method that
                uses gradients.
        """
        transform = self._solve(grams)
        for r, matrices in transform.matrices.items():
            moderate = self._moderate(matrices)
            # applied to all pairs: a look at whether one needs it would wait for the GPU
            transform.matrices[r] = torch.where(moderate[:, None, None], matrices, _unchanged(matrices))
            transform.solved[r] = transform.solved[r] & moderate & self._may_be_solved[r]
        return transform

    def _moderate(self, matrices: Tensor) -> Tensor:
        """Return, for each pair of ``[2, P, k r, r]``, whether all entries stay below ``_LARGEST_ENTRY``; ``[P]`` bool.

        With larger entries a product could leave the range of float32.
        """
        # the largest entry of a positive definite matrix is on its diagonal
        entries = torch.diagonal(matrices, dim1=-2, dim2=-1) if self._symmetric else matrices.flatten(2).abs()
        return (entries < _LARGEST_ENTRY).all(dim=-1).all(dim=0)  # NaN compares False

    def _solve(self, grams: Matrices) -> Transform:
        if not self.shared_out:
            return self._method.solve(grams)
        own = {r: both[:, self._own[r]] for r, both in grams.items() if self._own[r].stop > self._own[r].start}
        solved = self._method.solve(own) if own else Transform({}, {})
        return self._gather(grams, solved)

    def _gather(self, grams: Matrices, own: Transform) -> Transform:
        width = {r: both.shape[-1] for r, both in grams.items()}
        sizes = {r: 1 + (r * (r + 1) if self._symmetric else 2 * width[r] * r) for r in grams}
        shares = {r: -(-count // self._comm.world_size) for r, count in self._counts.items()}
        parts = []
        for r in grams:  # one row per pair: a flag for solved, then its two matrices
            room = torch.zeros(shares[r], sizes[r], dtype=torch.float64, device=self._comm.device)
            if r in own.solved:
                values = triangles(own.matrices[r]) if self._symmetric else own.matrices[r].flatten(2)
                count = len(own.solved[r])
                room[:count, 0] = own.solved[r].to(room.dtype)
                room[:count, 1:] = values.transpose(0, 1).flatten(1)
            parts.append(room.flatten())
        gathered = self._comm.all_gather(torch.cat(parts)).split([part.numel() for part in parts], dim=1)
        transform = Transform({}, {})
        for r, of_ranks in zip(grams, gathered, strict=True):
            rows = of_ranks.reshape(-1, sizes[r])[: self._counts[r]]
            values = rows[:, 1:].unflatten(1, (2, -1)).transpose(0, 1)
            shape = (width[r], r)
            matrices = from_triangles(values, r) if self._symmetric else values.unflatten(2, shape)
            transform.matrices[r], transform.solved[r] = matrices, rows[:, 0] > 0
        return transform


def _unchanged(matrices: Tensor) -> Tensor:
    """The ``[k r, r]`` matrix that leaves a gradient as it is: the gradient is the last block that is multiplied."""
    rows, r = matrices.shape[-2:]
    return torch.eye(rows, dtype=matrices.dtype, device=matrices.device)[:, rows - r :]


def shares_out(lora_ranks: Sequence[int], world_size: int, device: torch.device) -> bool:
    """Return whether ranks share the pairs out. See :class:`Solver`."""
    work = sum(r**3 for r in lora_ranks)
    dear = work >= _DEAR_WORK.get(device.type, _DEAR_WORK_ELSEWHERE)
    return world_size > 1 and dear and len(lora_ranks) >= _LEAST_SHARE * world_size


def count_unsolved(solved: dict[int, Tensor]) -> Tensor:
    """Return how many pairs a method leaves as plain LoRA, a 0-dim tensor."""
    first, *others = [(~flags).sum() for flags in solved.values()]
    return sum(others, first)
