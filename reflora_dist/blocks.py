"""Whole rows of tall factors, batched by shape. Plain tensor work: no ranks, no engines.

A *tall* factor is ``A^T`` ``[in, r]`` or ``B`` ``[out, r]``. A *block* is a set of whole rows of one, as it lies
in memory: ``[r, columns]`` of lora_A, ``[rows, r]`` of lora_B. All that RefLoRA and its relatives do to the
factors is ``X^T X`` over blocks (a sum over rows) and ``X M`` with an r x r matrix (local to a row).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels

# Blocks of one shape are stacked for one batched product. The stack is temporary, so its size bounds the peak memory
# that a step adds. 2^20 elements keep a GPU busy, 8 MiB in float64; 2^16 stay in a CPU core's cache.
_STACKED_ELEMENTS = {"cpu": 1 << 16}
_STACKED_ELEMENTS_ELSEWHERE = 1 << 20
_MAX_PLANS = 64  # layers that are dropped at random leave ever new sets of gradients

SIDE_A, SIDE_B = 0, 1

Matrices = dict[int, Tensor]
"""One stack of r x r matrices per lora_rank r: ``{r: [P_r, r, r]}``, pairs in their order in the model."""


def stack_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """All elements of contiguous tensors as one flat view, if they follow each other in memory; else None."""
    address, dtype = tensors[0].data_ptr(), tensors[0].dtype
    for tensor in tensors:
        if tensor.data_ptr() != address or tensor.dtype != dtype:
            return None
        address += tensor.numel() * tensor.element_size()
    numel = sum(tensor.numel() for tensor in tensors)
    first = tensors[0]
    if (first.storage_offset() + numel) * first.element_size() > first.untyped_storage().nbytes():
        return None  # neighbours by chance
    return first.as_strided((numel,), (1,))


class BlockSpec(NamedTuple):
    """Place of a block: its pair, its side (SIDE_A or SIDE_B) and its shape in memory."""

    pair: int
    side: int
    shape: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Blocks of one side and shape that are computed together."""

    side: int
    lora_rank: int
    members: tuple[int, ...]  # positions in the list of blocks
    slots: Tensor  # [members] int64: positions of their pairs among the pairs of equal lora_rank


class BlockSet:
    """The blocks that one rank computes on, in a fixed order.

    Args:
        specs: the blocks.
        lora_ranks: r of every pair in the model.
        device: where products are computed.
        use_kernels: whether Triton kernels compute them; by default where they can.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        lora_ranks: Sequence[int],
        device: torch.device,
        use_kernels: bool | None = None,
    ) -> None:
        self.device = device
        self.specs = tuple(specs)
        self.pairs_by_rank: dict[int, list[int]] = {}
        for pair, lora_rank in enumerate(lora_ranks):
            self.pairs_by_rank.setdefault(lora_rank, []).append(pair)
        self._lora_ranks = tuple(lora_ranks)
        self._slots = {pair: slot for pairs in self.pairs_by_rank.values() for slot, pair in enumerate(pairs)}
        self._batches: dict[tuple[torch.device | None, ...], list[_Batch]] = {}
        self._tiled = None
        if kernels.usable(device) if use_kernels is None else use_kernels:
            from .kernels.launch import TiledBlocks  # imports Triton, which not every machine has

            if max(lora_ranks) <= kernels.LARGEST_LORA_RANK:
                self._tiled = TiledBlocks(self.specs, self._lora_ranks, self._slots, self.pairs_by_rank, device)

    def grams(self, blocks: Sequence[Tensor | None]) -> Matrices:
        """This rank's share of every Gram matrix.

        Args:
            blocks: the factors' blocks, in the order of ``specs``, contiguous; None counts as no rows.

        Returns:
            For every lora_rank r ``[2, P_r, r, r]`` float64: ``A A^T`` and ``B^T B`` over this rank's blocks,
            zero where it holds none. Formed in float64, since a Gram squares the condition number.
        """
        if self._tiled is not None and (located := self._tiled.locate("grams", blocks)) is not None:
            return self._tiled.grams(located)
        grams = {
            lora_rank: torch.zeros(2, len(pairs), lora_rank, lora_rank, dtype=torch.float64, device=self.device)
            for lora_rank, pairs in self.pairs_by_rank.items()
        }
        for batch, tensors in self._present(blocks):
            stacked = _stack(tensors).to(self.device, non_blocking=True).to(torch.float64)
            product = stacked @ stacked.mT if batch.side == SIDE_A else stacked.mT @ stacked
            grams[batch.lora_rank][batch.side].index_add_(0, batch.slots, product)
        return grams

    def multiply_(self, blocks: Sequence[Tensor | None], left: Matrices, right: Matrices) -> None:
        """Multiply blocks in place: ``A <- left A`` on lora_A's side and ``B <- B right`` on lora_B's.

        Args:
            blocks: tensors in the order of ``specs`` (gradients, say); None is left out.
            left, right: ``{r: [P_r, r, r]}``.

        Products are formed in float64 and rounded once to the block's dtype: a gradient of lora_A is small just
        where S^-1 is large, and in float32 that product loses two digits at cond(B) = 1e4.
        """
        if self._tiled is not None and (located := self._tiled.locate("products", blocks)) is not None:
            self._tiled.multiply_(located, left, right)
            return
        for batch, tensors in self._present(blocks):
            held = _stack(tensors)
            stacked = held.to(self.device, non_blocking=True).to(torch.float64)
            matrices = (left if batch.side == SIDE_A else right)[batch.lora_rank].index_select(0, batch.slots)
            product = matrices @ stacked if batch.side == SIDE_A else stacked @ matrices
            if held.data_ptr() == tensors[0].data_ptr():  # a view of them
                held.copy_(product)
            else:
                torch._foreach_copy_(tensors, list(product.to(tensors[0].device).unbind()))

    def stacked_grams(self, streams: Sequence[Sequence[Tensor | None]]) -> Matrices:
        """This rank's share of the Grams of several tall matrices side by side, ``[X_1, X_2, ...]``.

        Args:
            streams: k lists of blocks, each as for :meth:`grams`: the factors, their gradients, ... A block of the
                first that is None counts as no rows, of another as zeros.

        Returns:
            For every lora_rank r ``[2, P_r, k r, k r]`` float64.
        """
        size = len(streams)
        grams = {
            r: torch.zeros(2, len(pairs), size * r, size * r, dtype=torch.float64, device=self.device)
            for r, pairs in self.pairs_by_rank.items()
        }
        for batch, _ in self._present(streams[0]):
            stacked = self._side_by_side(streams, batch)
            product = stacked @ stacked.mT if batch.side == SIDE_A else stacked.mT @ stacked
            grams[batch.lora_rank][batch.side].index_add_(0, batch.slots, product)
        return grams

    def combine_(
        self, streams: Sequence[Sequence[Tensor | None]], outputs: Sequence[int], left: Matrices, right: Matrices
    ) -> None:
        """Replace tall matrices by combinations of several, ``[X_1, X_2, ...] M``, formed in float64.

        Args:
            streams: k lists of blocks; where a block of the first output is None, nothing is done.
            outputs: which m of the streams are overwritten.
            left: ``{r: [P_r, m r, k r]}`` for lora_A's side, ``[A; grad_A; ...]``.
            right: ``{r: [P_r, k r, m r]}`` for lora_B's.
        """
        for batch, _ in self._present(streams[outputs[0]]):
            stacked = self._side_by_side(streams, batch)
            matrices = (left if batch.side == SIDE_A else right)[batch.lora_rank].index_select(0, batch.slots)
            product = matrices @ stacked if batch.side == SIDE_A else stacked @ matrices
            parts = product.split(batch.lora_rank, dim=1 if batch.side == SIDE_A else 2)
            batch_shape = self.specs[batch.members[0]].shape
            for output, part in zip(outputs, parts, strict=True):
                blocks = [streams[output][member] for member in batch.members]
                tensors = [block.view(batch_shape) for block in blocks if block is not None]  # never a copy
                assert len(tensors) == len(blocks)
                torch._foreach_copy_(tensors, list(part.to(tensors[0].device).unbind()))

    def _side_by_side(self, streams: Sequence[Sequence[Tensor | None]], batch: _Batch) -> Tensor:
        """``[blocks, k r, columns]`` or ``[blocks, rows, k r]``, float64."""
        shape = self.specs[batch.members[0]].shape
        dim = 1 if batch.side == SIDE_A else 2
        whole = [len(batch.members), *shape]
        whole[dim] *= len(streams)
        side_by_side = torch.empty(whole, dtype=torch.float64, device=self.device)
        for stream, part in zip(streams, side_by_side.split(batch.lora_rank, dim), strict=True):
            blocks = [stream[member] for member in batch.members]
            like = next((block for block in blocks if block is not None), torch.empty(0, device=self.device))
            zeros = like.new_zeros(shape) if any(block is None for block in blocks) else None
            tensors = [zeros if block is None else block.view(shape) for block in blocks]
            part.copy_(_stack([tensor for tensor in tensors if tensor is not None]), non_blocking=True)
        return side_by_side

    def _present(self, blocks: Sequence[Tensor | None]) -> Iterator[tuple[_Batch, list[Tensor]]]:
        """Batches of the blocks that are not None. Few patterns of absence occur, and each is planned once."""
        # Received blocks lie on the communication device, direct ones where the engine has its shards.
        devices = tuple(None if block is None else block.device for block in blocks)
        assert len(devices) == len(self.specs)
        if devices not in self._batches:
            if len(self._batches) >= _MAX_PLANS:
                self._batches.clear()
            self._batches[devices] = list(self._plan(devices))
        for batch in self._batches[devices]:
            shape = self.specs[batch.members[0]].shape
            # never a copy, which would be changed in vain
            present = [block for member in batch.members if (block := blocks[member]) is not None]
            yield batch, [block if block.shape == shape else block.view(shape) for block in present]

    def _plan(self, devices: tuple[torch.device | None, ...]) -> Iterator[_Batch]:
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for position, spec in enumerate(self.specs):
            if devices[position] is not None:
                key = (self._lora_ranks[spec.pair], spec.side, spec.shape, devices[position])
                by_shape.setdefault(key, []).append(position)
        for (lora_rank, side, shape, _), positions in by_shape.items():
            elements = _STACKED_ELEMENTS.get(self.device.type, _STACKED_ELEMENTS_ELSEWHERE)
            size = max(1, elements // (shape[0] * shape[1]))
            for start in range(0, len(positions), size):
                members = tuple(positions[start : start + size])
                slots = torch.tensor([self._slots[self.specs[m].pair] for m in members], dtype=torch.int64)
                yield _Batch(side, lora_rank, members, slots.to(self.device))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """``[len(tensors), *shape]``, a view where the tensors follow each other in memory."""
    flat = stack_view(tensors)
    return torch.stack(list(tensors)) if flat is None else flat.view(len(tensors), *tensors[0].shape)
