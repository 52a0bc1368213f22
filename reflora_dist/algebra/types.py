"""The types that the algebra shares: sides, stacks of r x r matrices, places of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SIDE_A, SIDE_B = 0, 1


Matrices = dict[int, Tensor]
"""One stack of r x r matrices per lora_rank r: ``{r: [P_r, r, r]}``, pairs in their order."""


def stack_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """All elements as one flat view, if tensors are contiguous and follow each other in memory; else None."""
    address, dtype = tensors[0].data_ptr(), tensors[0].dtype
    for tensor in tensors:
        if tensor.data_ptr() != address or tensor.dtype != dtype or not tensor.is_contiguous():
            return None
        address += tensor.numel() * tensor.element_size()
    numel = sum(tensor.numel() for tensor in tensors)
    first = tensors[0]
    if (first.storage_offset() + numel) * first.element_size() > first.untyped_storage().nbytes():
        return None  # neighbours by chance
    return first.as_strided((numel,), (1,))


class BlockSpec(NamedTuple):
    """Place of a block.

    Attributes:
        pair, side: whose factor it is a part of; SIDE_A or SIDE_B.
        shape: in memory.
        columns: whether the tall factor's rows are its columns, ``[r, rows]``.
    """

    pair: int
    side: int
    shape: tuple[int, int]
    columns: bool

    @property
    def rows(self) -> int:
        """Rows of the tall factor."""
        return self.shape[1] if self.columns else self.shape[0]
