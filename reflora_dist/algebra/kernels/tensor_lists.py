"""Triton kernels on lists of tensors of any shape: a sum over each tensor, and a product of each with a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import addresses_of, fits, launching_on, send_addresses, stream_of
from .tiles import sum_kernel

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_WIDTH = 1024  # elements that a program loads at a time
_TILE = 16 * _WIDTH  # elements per program
_WARPS = 4
_MAX_PLANS = 16

Pattern = tuple[tuple[torch.dtype, int] | None, ...]
"""The dtype and number of elements of every tensor, None for an absent tensor."""

# A table of tiles has three int64 columns: the tensor, its first element, and one past its last.


@triton.jit
def total_kernel(
    addresses,  # [tensors] int64
    tiles,  # [programs, 3] int64
    partials,  # [all tiles] float64
    first_partial,
    squared: tl.constexpr,
    dtype: tl.constexpr,
    width: tl.constexpr,
):
    """Sum absolute values, or squares, over each tile."""
    program = tl.program_id(0)
    tile = tiles + program * 3
    base = tl.load(addresses + tl.load(tile)).to(tl.pointer_type(dtype))
    start = tl.load(tile + 1)
    stop = tl.load(tile + 2)
    total = tl.zeros([width], dtype=tl.float64)
    for first in range(start, stop, width):
        places = first + tl.arange(0, width)
        x = tl.load(base + places, mask=places < stop, other=0.0).to(tl.float64)
        total += x * x if squared else tl.abs(x)
    tl.store(partials + first_partial + program, tl.sum(total, axis=0))


@triton.jit
def scale_kernel(
    addresses,  # [tensors] int64
    tiles,  # [programs, 3] int64
    factors,  # [tensors] float64
    dtype: tl.constexpr,
    width: tl.constexpr,
):
    """Multiply each tensor by its factor in place; the product is formed in float64."""
    tile = tiles + tl.program_id(0) * 3
    tensor = tl.load(tile)
    base = tl.load(addresses + tensor).to(tl.pointer_type(dtype))
    start = tl.load(tile + 1)
    stop = tl.load(tile + 2)
    factor = tl.load(factors + tensor)
    for first in range(start, stop, width):
        places = first + tl.arange(0, width)
        x = tl.load(base + places, mask=places < stop, other=0.0).to(tl.float64)
        tl.store(base + places, (x * factor).to(dtype), mask=places < stop)


@dataclasses.dataclass(frozen=True)
class _Plan:
    launches: tuple[tuple[torch.dtype, Tensor], ...]  # per dtype the tiles of its tensors, [programs, 3]
    spans: Tensor  # [tensors, 2] int32: the part of `order` for each tensor, first and one past the last
    order: Tensor  # [tiles] int32: numbers of tiles


@dataclasses.dataclass(frozen=True)
class Located:
    """Tensors that kernels can work on, with their current addresses."""

    addresses: list[int]
    table: Tensor  # [tensors] int64, the addresses on the device
    plan: _Plan


class PerTensorKernels:
    """Launches of the kernels on lists of tensors of one device; the order of summation is fixed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plans: dict[Pattern, _Plan] = {}
        self._located: dict[tuple[str, int], Located] = {}

    def locate(self, name: str, tensors: Sequence[Tensor | None]) -> Located | None:
        """Return the tensors with their addresses on the device, or None if kernels cannot work on some of them.

        Args:
            name: a name for the list, under which the addresses are remembered; they rarely change between steps.
            tensors: the tensors; None is skipped.
        """
        addresses = addresses_of(tensors)
        key = name, stream_of(self._device)
        known = self._located.get(key)
        if known is not None and known.addresses == addresses:
            return known
        if not all(map(self._fits, tensors)):
            return None
        pattern = tuple(None if tensor is None else (tensor.dtype, tensor.numel()) for tensor in tensors)
        self._located[key] = known = Located(addresses, send_addresses(addresses, self._device), self._plan(pattern))
        return known

    def _fits(self, tensor: Tensor | None) -> bool:
        return tensor is None or fits(tensor, self._device, _TRITON_DTYPES)

    def totals(self, located: Located, squared: bool) -> Tensor:
        """Return ``[tensors]`` float64: each tensor's sum of squares, or of absolute values; zero for None."""
        plan = located.plan
        partials = torch.empty(len(plan.order), dtype=torch.float64, device=self._device)
        totals = torch.empty(len(plan.spans), dtype=torch.float64, device=self._device)
        first = 0
        with launching_on(self._device):
            for dtype, tiles in plan.launches:
                total_kernel[(len(tiles),)](
                    located.table, tiles, partials, first, squared, _TRITON_DTYPES[dtype], _WIDTH, num_warps=_WARPS
                )
                first += len(tiles)
            sum_kernel[(len(totals), 1)](partials, plan.spans, plan.order, totals, 1, 1, num_warps=1)
        return totals

    def scale_(self, located: Located, factors: Tensor) -> None:
        """Multiply every tensor by its entry of ``factors`` ``[tensors]`` float64."""
        factors = factors.contiguous()
        with launching_on(self._device):
            for dtype, tiles in located.plan.launches:
                scale_kernel[(len(tiles),)](
                    located.table, tiles, factors, _TRITON_DTYPES[dtype], _WIDTH, num_warps=_WARPS
                )

    def _plan(self, pattern: Pattern) -> _Plan:
        if pattern not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[pattern] = self._planned(pattern)
        return self._plans[pattern]

    def _planned(self, pattern: Pattern) -> _Plan:
        tiles: dict[torch.dtype, list[tuple[int, int, int]]] = {}
        for tensor, entry in enumerate(pattern):
            if entry is not None:
                dtype, numel = entry
                cuts = range(0, numel, _TILE)
                tiles.setdefault(dtype, []).extend((tensor, start, min(start + _TILE, numel)) for start in cuts)
        tiles = {dtype: of_dtype for dtype, of_dtype in tiles.items() if of_dtype}  # tensors may be empty
        owners = torch.tensor([tensor for of_dtype in tiles.values() for tensor, _, _ in of_dtype], dtype=torch.int64)
        ends = torch.bincount(owners, minlength=len(pattern)).cumsum(0)
        starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
        spans = torch.stack([starts, ends], dim=1).to(torch.int32)
        order = torch.sort(owners, stable=True).indices.to(torch.int32)
        return _Plan(
            tuple((dtype, torch.tensor(of_dtype).to(self._device)) for dtype, of_dtype in tiles.items()),
            spans.to(self._device),
            order.to(self._device),
        )
