"""Baselines of RefLoRA: a loop over pairs, and whole factors that are gathered first.

Each is a function that is called right before the update, in place of the hook of ``reflora_dist.attach``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from reflora_dist.algebra.refactorization import solve_refactorization
from reflora_dist.collectives.tiling import Layout, Shape
from reflora_dist.engines.base import Engine

_SIDE_A = 0  # factors are listed lora_A, lora_B, lora_A, ...
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

Solver = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps ``A A^T`` and ``B^T B``, ``[P, r, r]`` float64, to S and S^-1, ``[P, r, r]``."""


def solve_as_published(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``S = G_A^-1/2 (G_A^1/2 G_B G_A^1/2)^1/2 G_A^-1/2`` and its inverse, by two eigendecompositions."""
    root_a, inverse_root_a = _square_root(gram_a)
    middle, inverse_middle = _square_root(root_a @ gram_b @ root_a)
    return inverse_root_a @ middle @ inverse_root_a, root_a @ inverse_middle @ root_a


def _square_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    root = values.sqrt()
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors / root.unsqueeze(-2)) @ vectors.mT


def solve_batched(gram_a: Tensor, gram_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return S and its inverse from the package's own solver. Times then differ by communication and layout only."""
    s, s_inv, _ = solve_refactorization(gram_a, gram_b)
    return s, s_inv


class Loop:
    """The plain method for whole factors: pair after pair, written straight from the formula.

    Gram matrices and S are float64, because a Gram matrix squares the condition number. Products have the dtype of
    the gradients.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.layout != "whole":
            raise ValueError(f"the loop needs whole factors, {engine.name} cuts them; choose --engine single or ddp")
        self._engine = engine

    def __call__(self) -> None:
        weights, gradients = self._engine.weights(), self._engine.gradients()
        for pair in range(len(weights) // 2):
            lora_a, lora_b = (factor.double() for factor in weights[2 * pair : 2 * pair + 2])
            grad_a, grad_b = gradients[2 * pair : 2 * pair + 2]
            assert grad_a is not None and grad_b is not None
            s, s_inv = solve_as_published(lora_a @ lora_a.mT, lora_b.mT @ lora_b)
            grad_a.copy_(s_inv.to(grad_a.dtype) @ grad_a)
            grad_b.copy_(grad_b @ s.to(grad_b.dtype))


class Gather:
    """Gather whole factors and gradients; every rank then refactors all of them and keeps its own pieces.

    Args:
        engine: an engine that cuts factors into pieces in the order of ranks, or lora_A ``[r, in]`` into equal blocks
            of columns.
        each: whether each adapter has an all-gather of its own, for its four pieces (two factors, two gradients), and
            pairs are solved one by one as published. ``GatheredParameters`` or ``full_tensor()`` on each adapter
            costs at least that much. grad_B could stay where it is, because it is refactored row by row. Otherwise
            one all-gather brings everything, and products are batched.

    Raises:
        ValueError: the engine holds factors whole, or updates them in several firings.

    Communication: per call one all-gather, or one per adapter.
    """

    def __init__(self, engine: Engine, each: bool) -> None:
        if engine.group is None:
            raise ValueError(f"{engine.name} holds whole factors, there is nothing to gather")
        self._engine = engine
        layouts = engine.layouts()
        size = 2 if each else len(layouts)
        solve = solve_as_published if each else solve_batched
        device = engine.weights()[0].device
        self._chunks = [
            GatheredPairs(layouts[start : start + size], engine.group, solve, device)
            for start in range(0, len(layouts), size)
        ]

    def __call__(self) -> None:
        firing = self._engine.firing()
        if not (firing.first and firing.last):
            raise ValueError(f"{self._engine.name} updates in several sub-groups; make its sub_group_size larger")
        weights, gradients = self._engine.weights(), self._engine.gradients()
        start = 0
        for chunk in self._chunks:
            stop = start + chunk.num_factors
            chunk(weights[start:stop], gradients[start:stop])
            start = stop


class _Batch(NamedTuple):
    """Factors of one side and shape.

    Attributes:
        side: 0 for lora_A, 1 for lora_B.
        columns: whether they are stored ``[r, rows]``.
        shape: shape of each factor, or of each block of columns.
        slots: the pair of each factor or block.
    """

    side: int
    columns: bool
    shape: Shape
    slots: Tensor


class GatheredPairs:
    """Pairs of equal r that are gathered in one collective and refactored in batched products.

    Args:
        layouts: layouts of their factors, lora_A and lora_B alternating.
        group: the ranks that together hold the factors once.
        solve: computes S from Gram matrices.
        device: the pieces' device.
    """

    def __init__(
        self, layouts: Sequence[Layout], group: dist.ProcessGroup, solve: Solver, device: torch.device
    ) -> None:
        self._group = group
        self._solve = solve
        self.num_factors = len(layouts)
        self._lora_rank = layouts[0].lora_rank
        assert all(layout.lora_rank == self._lora_rank for layout in layouts)
        ranks = range(dist.get_world_size(group))
        # factors of one side and layout are adjacent, so that batched products need no copies
        alike: dict[tuple[int, Layout], list[int]] = {}
        for factor, layout in enumerate(layouts):
            alike.setdefault((factor % 2, layout), []).append(factor)
        self._order = [factor for members in alike.values() for factor in members]
        self._batches = []
        for (side, layout), members in alike.items():
            # blocks of columns follow each other; their Gram matrices add up, and S^-1 multiplies each block
            blocks = len(ranks) if layout.columns and layout.by_rows else 1
            slots = torch.tensor([factor // 2 for factor in members], device=device).repeat_interleave(blocks)
            rows, columns = layout.shape
            self._batches.append(_Batch(side, layout.columns, (rows, columns // blocks), slots))
        # weights, then gradients
        self._sizes = [[layouts[factor].piece(rank).numel for factor in self._order] * 2 for rank in ranks]
        self._slot = max(sum(sizes) for sizes in self._sizes)
        self._rank, self._numel = dist.get_rank(group), sum(layout.numel for layout in layouts)
        # for each factor the elements of the ranks before this one, where its own piece starts
        self._before = [sum(sizes[i] for sizes in self._sizes[: self._rank]) for i in range(self.num_factors)]

    def __call__(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        own_gradients = [_present(gradients[factor], weights[factor]) for factor in self._order]
        whole = self.gather([*(weights[factor].reshape(-1) for factor in self._order), *own_gradients])
        whole_weights, whole_gradients = whole.view(2, -1).unbind()
        s, s_inv = self._solve(*self._grams(whole_weights))
        for batch, blocks in self._blocks(whole_gradients):
            matrices = (s_inv if batch.side == _SIDE_A else s)[batch.slots].to(blocks.dtype)
            blocks.copy_(matrices @ blocks if batch.columns else blocks @ matrices)
        self._keep_own(whole_gradients, own_gradients)

    def gather(self, pieces: list[Tensor]) -> Tensor:
        """Return every factor and every gradient, flat and whole, in ``_order``."""
        padding = pieces[0].new_zeros(self._slot - sum(piece.numel() for piece in pieces))
        send = torch.cat([*pieces, padding])
        received = send.new_empty(len(self._sizes), self._slot)
        _all_gather(received.view(-1), send, group=self._group)
        by_rank = [row[: sum(sizes)].split(sizes) for row, sizes in zip(received, self._sizes, strict=True)]
        sources = [piece for of_factor in zip(*by_rank, strict=True) for piece in of_factor]
        whole = send.new_empty(2 * self._numel)
        targets = whole.split([source.numel() for source in sources])
        filled = [index for index, source in enumerate(sources) if source.numel()]
        torch._foreach_copy_([targets[index] for index in filled], [sources[index] for index in filled])
        return whole

    def _blocks(self, flat: Tensor) -> list[tuple[_Batch, Tensor]]:
        """Return each batch with its factors (or blocks) as ``[pairs, *shape]``, a view of ``flat``."""
        blocks, offset = [], 0
        for batch in self._batches:
            numel = batch.slots.numel() * batch.shape[0] * batch.shape[1]
            blocks.append((batch, flat[offset : offset + numel].view(-1, *batch.shape)))
            offset += numel
        return blocks

    def _grams(self, whole_weights: Tensor) -> tuple[Tensor, Tensor]:
        size = (2, self.num_factors // 2, self._lora_rank, self._lora_rank)
        grams = whole_weights.new_zeros(size, dtype=torch.float64)
        for batch, blocks in self._blocks(whole_weights):
            exact = blocks.double()
            grams[batch.side].index_add_(0, batch.slots, exact @ exact.mT if batch.columns else exact.mT @ exact)
        return grams[0], grams[1]

    def _keep_own(self, whole_gradients: Tensor, own_gradients: list[Tensor]) -> None:
        targets, sources, offset = [], [], 0
        for position, own in enumerate(own_gradients):
            first = offset + self._before[position]
            offset += sum(sizes[position] for sizes in self._sizes)
            if own.numel():
                targets.append(own)
                sources.append(whole_gradients[first : first + own.numel()])
        if targets:
            torch._foreach_copy_(targets, sources)


def _present(gradient: Tensor | None, weight: Tensor) -> Tensor:
    """Return the piece of a gradient, flat. It is empty where the rank holds nothing of the factor."""
    if gradient is None:
        assert not weight.numel(), "a factor without a gradient cannot be refactored"
        return weight.new_empty(0)
    return gradient.view(-1)
