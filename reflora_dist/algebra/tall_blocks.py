"""Gram matrices and products of whole rows of tall factors, batched by shape.

A *tall* factor X is ``A^T`` ``[in, r]`` or ``B`` ``[out, r]``. A *block* is a set of whole rows of a tall factor. In
memory it is ``[rows, r]``, or ``[r, rows]`` if lora_A is stored as PEFT stores it. RefLoRA and its relatives need two
operations only: ``X^T X`` over blocks (a sum over rows) and ``X M`` with an r x r matrix (local to a row).

The factors of E experts lie side by side in one block, with rows of E r elements. They count as E pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .types import SIDE_B, BlockSpec, Matrices, stack_view

# Blocks of one shape are stacked for one batched product. The stack is temporary: its size bounds the peak memory that
# a step adds. 2^16 elements stay in a CPU core's cache; 2^22 (32 MiB in float64) keep a GPU busy with few launches.
_STACKED_ELEMENTS = {"cpu": 1 << 16}
_STACKED_ELEMENTS_ELSEWHERE = 1 << 22
_MAX_PLANS = 64  # random layer dropping would add a new set of gradients in almost every step


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Blocks of one shape and orientation, of lora_A or lora_B, that are computed together."""

    lora_rank: int
    shape: tuple[int, int]
    columns: bool
    experts: int
    alternating: bool  # whether the expert is the fastest index
    members: tuple[int, ...]  # positions in the list of blocks

    def apart(self, stacked: Tensor) -> Tensor:
        """Return ``[blocks E, rows, r]``, or ``[blocks E, r, rows]`` of columns, from ``[blocks, *shape]``."""
        if self.experts == 1:
            return stacked
        if self.columns:
            return stacked.unflatten(1, (self.experts, self.lora_rank)).flatten(0, 1)
        if self.alternating:
            return stacked.unflatten(2, (self.lora_rank, self.experts)).permute(0, 3, 1, 2).flatten(0, 1)
        return stacked.unflatten(2, (self.experts, self.lora_rank)).permute(0, 2, 1, 3).flatten(0, 1)

    def together(self, apart: Tensor) -> Tensor:
        """Return ``[blocks, *shape]`` from what :meth:`apart` returned."""
        if self.experts == 1:
            return apart
        by_block = apart.unflatten(0, (-1, self.experts))
        if self.columns:
            return by_block.flatten(1, 2)
        return by_block.permute(0, 2, 3, 1).flatten(2) if self.alternating else by_block.transpose(1, 2).flatten(2)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The batches of a step.

    Attributes:
        batches: all batches, sorted by lora_rank.
        slots: per lora_rank ``[blocks E]`` int64, the place of each Gram in ``[2 P_r]``: lora_A's Grams come first,
            then lora_B's.
        sizes: per lora_rank the number of Grams in each batch.
    """

    batches: tuple[_Batch, ...]
    slots: dict[int, Tensor]
    sizes: dict[int, list[int]]


class BlockSet:
    """The blocks that one rank computes on, in a fixed order.

    Args:
        specs: pair, side and shape of each block.
        lora_ranks: r of every pair, indexed by ``BlockSpec.pair``.
        device: the device of the products.
        use_kernels: whether Triton kernels compute them; by default wherever the kernels run.
        experts: E of every pair; empty if all are 1.

    Attributes:
        pairs_by_rank: per r the number of the pair that each of the P_r Grams of one side belongs to; E times in a row
            for a pair of E experts.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        lora_ranks: Sequence[int],
        device: torch.device,
        use_kernels: bool | None = None,
        experts: Sequence[int] = (),
    ) -> None:
        self.device = device
        self.specs = tuple(specs)
        self.pairs_by_rank: dict[int, list[int]] = {}
        places = []  # of every pair's first Gram
        for pair, (lora_rank, count) in enumerate(zip(lora_ranks, experts or [1] * len(lora_ranks), strict=True)):
            of_rank = self.pairs_by_rank.setdefault(lora_rank, [])
            places.append(len(of_rank))
            of_rank += [pair] * count
        self._lora_ranks = tuple(lora_ranks)
        self._slots = [
            spec.side * len(self.pairs_by_rank[lora_ranks[spec.pair]]) + places[spec.pair] for spec in self.specs
        ]
        self._plans: dict[tuple[torch.device | None, ...], _Plan] = {}
        self._memory = torch.empty(0, dtype=torch.float64)
        self._rooms: dict[tuple[Any, ...], tuple[Tensor, list[Tensor]]] = {}
        self._tiled = None
        plain = all(spec.experts == 1 for spec in self.specs)  # the kernels know no experts
        if self.specs and plain and (kernels.usable(device) if use_kernels is None else use_kernels):
            from .kernels.launch import TiledBlocks  # imports Triton, which not every machine has

            if max(lora_ranks) <= kernels.LARGEST_LORA_RANK:
                self._tiled = TiledBlocks(self.specs, self._lora_ranks, self._slots, self.pairs_by_rank, device)

    def grams(self, blocks: Sequence[Tensor | None]) -> Matrices:
        """Return this rank's contribution to every Gram matrix.

        Args:
            blocks: the factors' blocks, in the order of ``specs``, contiguous; None counts as no rows.

        Returns:
            For every lora_rank r ``[2, P_r, r, r]`` float64: ``A A^T`` and ``B^T B`` over this rank's blocks,
            zero for a factor without a block here. The products are formed in float64, since a Gram matrix squares
            the condition number.
        """
        if self._tiled is not None and (located := self._tiled.locate("grams", blocks)) is not None:
            return self._tiled.grams(located)
        plan = self._plan(blocks)
        products = []
        for batch in plan.batches:
            stacked = self._load(batch, _tensors(batch, blocks))
            products.append(stacked @ stacked.mT if batch.columns else stacked.mT @ stacked)
        return self._sum(plan, products, 1)

    def multiply_(self, blocks: Sequence[Tensor | None], matrices: Matrices) -> None:
        """Multiply blocks in place: ``X <- X M``.

        Args:
            blocks: tensors in the order of ``specs`` (for example gradients); None is skipped.
            matrices: M, ``{r: [2, P_r, r, r]}`` float64, for lora_A's side and for lora_B's.

        Products are formed in float64 and rounded once to the block's dtype. The gradient of lora_A is small exactly
        where S^-1 is large, so a float32 product would lose two digits at cond(B) = 1e4.
        """
        if self._tiled is not None and (located := self._tiled.locate("products", blocks)) is not None:
            self._tiled.multiply_(located, matrices)
            return
        plan = self._plan(blocks)
        for batch, factors in zip(plan.batches, _matrices(plan, matrices), strict=True):
            tensors = _tensors(batch, blocks)
            stacked = self._load(batch, tensors)
            operands = (factors.mT, stacked) if batch.columns else (stacked, factors)
            if batch.experts > 1:
                self._store(batch.together(torch.bmm(*operands)), tensors)
                continue
            product, parts = self._room(1, batch)
            torch.bmm(*operands, out=product)
            self._store(product, tensors, parts)

    def stacked_grams(self, streams: Sequence[Sequence[Tensor | None]]) -> Matrices:
        """Return this rank's contribution to the Gram matrices of tall matrices side by side, ``[X_1, X_2, ...]``.

        Args:
            streams: k lists of blocks, each as for :meth:`grams`: the factors, their gradients, ... None counts as
                no rows in the first list, and as zeros in the others.

        Returns:
            For every lora_rank r ``[2, P_r, k r, k r]`` float64.
        """
        plan = self._plan(streams[0])
        products = []
        for batch in plan.batches:
            stacked = self._side_by_side(streams, batch)
            products.append(stacked @ stacked.mT if batch.columns else stacked.mT @ stacked)
        return self._sum(plan, products, len(streams))

    def combine_(self, streams: Sequence[Sequence[Tensor | None]], outputs: Sequence[int], matrices: Matrices) -> None:
        """Overwrite tall matrices with ``[X_1, X_2, ...] M``, formed in float64.

        Args:
            streams: the X, as k lists of blocks; a block that is None in the first output is skipped.
            outputs: indices of the m streams that are overwritten.
            matrices: M, ``{r: [2, P_r, k r, m r]}`` float64.
        """
        plan = self._plan(streams[outputs[0]])
        for batch, factors in zip(plan.batches, _matrices(plan, matrices), strict=True):
            stacked = self._side_by_side(streams, batch)
            product = factors.mT @ stacked if batch.columns else stacked @ factors
            parts = product.split(batch.lora_rank, dim=1 if batch.columns else 2)
            for output, part in zip(outputs, parts, strict=True):
                self._store(batch.together(part), _tensors(batch, streams[output]))

    def _side_by_side(self, streams: Sequence[Sequence[Tensor | None]], batch: _Batch) -> Tensor:
        """Return a batch's streams side by side: ``[blocks E, k r, rows]`` or ``[blocks E, rows, k r]`` float64."""
        shape = batch.shape
        dim = 1 if batch.columns else 2
        rows = shape[1] if batch.columns else shape[0]
        whole = [len(batch.members) * batch.experts, rows, rows]
        whole[dim] = len(streams) * batch.lora_rank
        side_by_side = torch.empty(whole, dtype=torch.float64, device=self.device)
        for stream, part in zip(streams, side_by_side.split(batch.lora_rank, dim), strict=True):
            blocks = [stream[member] for member in batch.members]
            like = next((block for block in blocks if block is not None), torch.empty(0, device=self.device))
            zeros = like.new_zeros(shape) if any(block is None for block in blocks) else None
            tensors = [zeros if block is None else block.view(shape) for block in blocks]
            stacked = _stack([tensor for tensor in tensors if tensor is not None])
            part.copy_(batch.apart(stacked), non_blocking=True)
        return side_by_side

    def _load(self, batch: _Batch, tensors: list[Tensor]) -> Tensor:
        """Return a batch as ``[blocks E, rows, r]`` or ``[blocks E, r, rows]`` float64, on the products' device."""
        if self.device.type != "cpu":
            return batch.apart(_stack(tensors).to(self.device, non_blocking=True).to(torch.float64))
        stacked, parts = self._room(0, batch)
        torch._foreach_copy_(parts, tensors)
        return batch.apart(stacked)

    def _store(self, product: Tensor, tensors: list[Tensor], parts: list[Tensor] | None = None) -> None:
        """Write a product into its blocks.

        Args:
            product: ``[blocks, *shape]`` float64.
            tensors: the blocks.
            parts: the product's view for each block; empty or None if there are none yet.
        """
        if self.device.type != "cpu" and len({tensor.dtype for tensor in tensors}) == 1:
            product = product.to(tensors[0])  # one kernel rounds all, and copies of equal dtype are one kernel too
        torch._foreach_copy_(tensors, parts or list(product.unbind()))

    def _room(self, which: int, batch: _Batch) -> tuple[Tensor, list[Tensor]]:
        """Return float64 memory ``[blocks, *shape]`` for a batch, and its view for each block.

        On a CPU the memory is reused, so that it stays in the cache. Elsewhere it is new, and the list is empty.

        Args:
            which: 0 for operands, 1 for products.
            batch: the batch to hold.
        """
        shape = (len(batch.members), *batch.shape)
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=torch.float64, device=self.device), []
        if (which, shape) not in self._rooms:
            numel = math.prod(shape)
            if 2 * numel > self._memory.numel():
                self._memory = torch.empty(2 * numel, dtype=torch.float64)
                self._rooms.clear()
            room = self._memory[which * numel : (which + 1) * numel].view(shape)
            self._rooms[which, shape] = room, list(room.unbind())
        return self._rooms[which, shape]

    def _sum(self, plan: _Plan, products: list[Tensor], size: int) -> Matrices:
        """Sum the products of all batches by factor, into ``{r: [2, P_r, size r, size r]}``."""
        grams = {}
        for lora_rank, pairs in self.pairs_by_rank.items():
            width = size * lora_rank
            grams[lora_rank] = torch.zeros(2, len(pairs), width, width, dtype=torch.float64, device=self.device)
        start = 0
        for lora_rank, slots in plan.slots.items():
            stop = start + len(plan.sizes[lora_rank])
            grams[lora_rank].flatten(0, 1).index_add_(0, slots, torch.cat(products[start:stop]))
            start = stop
        return grams

    def _plan(self, blocks: Sequence[Tensor | None]) -> _Plan:
        """Return the batches of the blocks that are not None; each pattern of absent blocks is planned once."""
        # Received blocks lie on the communication device, direct blocks on the device of the engine's shards.
        devices = tuple([None if block is None else block.device for block in blocks])
        assert len(devices) == len(self.specs)
        if devices not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            batches = sorted(self._batches(devices), key=lambda batch: batch.lora_rank)
            slots: dict[int, list[int]] = {}
            sizes: dict[int, list[int]] = {}
            for batch in batches:
                firsts = [self._slots[member] for member in batch.members]
                places = [first + expert for first in firsts for expert in range(batch.experts)]
                slots.setdefault(batch.lora_rank, []).extend(places)
                sizes.setdefault(batch.lora_rank, []).append(len(places))
            on_device = {lora_rank: torch.tensor(places).to(self.device) for lora_rank, places in slots.items()}
            self._plans[devices] = _Plan(tuple(batches), on_device, sizes)
        return self._plans[devices]

    def _batches(self, devices: tuple[torch.device | None, ...]) -> Iterator[_Batch]:
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for position, spec in enumerate(self.specs):
            if devices[position] is not None:
                alternating = spec.experts > 1 and spec.side == SIDE_B
                lora_rank = self._lora_ranks[spec.pair]
                key = (lora_rank, spec.shape, spec.columns, spec.experts, alternating, devices[position])
                by_shape.setdefault(key, []).append(position)
        elements = _STACKED_ELEMENTS.get(self.device.type, _STACKED_ELEMENTS_ELSEWHERE)
        for (lora_rank, shape, columns, experts, alternating, _), positions in by_shape.items():
            size = max(1, elements // (shape[0] * shape[1]))
            for start in range(0, len(positions), size):
                members = tuple(positions[start : start + size])
                yield _Batch(lora_rank, shape, columns, experts, alternating, members)


def _tensors(batch: _Batch, blocks: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the batch's blocks as views in its shape; writes to a copy would be lost."""
    present = [block for member in batch.members if (block := blocks[member]) is not None]
    return [block if block.shape == batch.shape else block.view(batch.shape) for block in present]


def _matrices(plan: _Plan, matrices: Matrices) -> Iterator[Tensor]:
    """Yield for every batch the matrices of its pairs, ``[blocks, ...]``."""
    for lora_rank, slots in plan.slots.items():
        yield from matrices[lora_rank].flatten(0, 1).index_select(0, slots).split(plan.sizes[lora_rank])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``[len(tensors), *shape]``, as a view if the tensors are contiguous neighbours in memory."""
    flat = stack_view(tensors)
    return torch.stack(list(tensors)) if flat is None else flat.view(len(tensors), *tensors[0].shape)
