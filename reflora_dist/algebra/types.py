"""Types that several modules share: sides of a pair, stacks of r x r matrices, and places of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SIDE_A, SIDE_B = 0, 1


Matrices = dict[int, Tensor]
"""Stacks of r x r matrices by lora_rank r: ``{r: [P_r, r, r]}``, with the P_r pairs of that r in their order."""


def stack_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return all elements as one flat view, or None.

    The view exists if the tensors have one dtype, are contiguous, and follow each other in one storage.
    """
    address, dtype = tensors[0].data_ptr(), tensors[0].dtype
    for tensor in tensors:
        if tensor.data_ptr() != address or tensor.dtype != dtype or not tensor.is_contiguous():
            return None
        address += tensor.numel() * tensor.element_size()
    numel = sum(tensor.numel() for tensor in tensors)
    first = tensors[0]
    if (first.storage_offset() + numel) * first.element_size() > first.untyped_storage().nbytes():
        return None  # separate allocations that happen to be neighbours
    return first.as_strided((numel,), (1,))


class BlockSpec(NamedTuple):
    """The factor that a block belongs to, and the block's shape.

    Attributes:
        pair: number of the pair.
        side: SIDE_A for lora_A, SIDE_B for lora_B.
        shape: shape in memory.
        columns: True if the block is ``[r, rows]``, with the tall factor's rows as columns; False if ``[rows, r]``.
        experts: E, the number of factors that lie side by side in the block, whose rows are then E r long. Those of
            lora_A follow each other; those of lora_B alternate, the expert being the fastest index.
    """

    pair: int
    side: int
    shape: tuple[int, int]
    columns: bool
    experts: int = 1

    @property
    def rows(self) -> int:
        """Number of rows of the tall factor in this block."""
        return self.shape[1] if self.columns else self.shape[0]
