"""Plans and launches the kernels over a set of blocks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import BlockSpec, Matrices
from . import padded
from .solve import invert_kernel, solve_kernel
from .tiles import gram_kernel, multiply_kernel, sum_kernel

# Triton 3.6 fails to compile a float64 product of 16-bit operands.
_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

_SUM_WIDTH = 1024

Pattern = tuple[torch.dtype | None, ...]
"""The dtype of every block, None where there is none."""


@dataclasses.dataclass(frozen=True)
class _Launch:
    """Blocks of one orientation, lora_rank and dtype, and the tiles that programs work on."""

    columns: bool
    lora_rank: int
    dtype: torch.dtype
    members: tuple[int, ...]  # positions in the list of blocks
    tiles: Tensor  # [programs, 5] int32
    slots: tuple[int, ...]  # of each tile's Gram
    rows_aligned: bool


@dataclasses.dataclass(frozen=True)
class _Sum:
    """Which partial Grams of one lora_rank belong to which Gram."""

    spans: Tensor  # [2 P_r, 2] int32
    order: Tensor  # [partials] int32


@dataclasses.dataclass(frozen=True)
class _Plan:
    launches: tuple[_Launch, ...]
    sums: dict[int, _Sum]  # empty for products


@dataclasses.dataclass(frozen=True)
class Located:
    """Blocks that kernels can work on, where they lie now. Most of them stay there from step to step."""

    addresses: list[int]
    table: Tensor  # the same on the device
    plan: _Plan
    aligned: tuple[bool, ...]  # per launch, whether 16-byte accesses are possible


def addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where they begin, 0 for None; asked for in every step, so in the fastest way that Python has."""
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # some are None
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def fits(tensor: Tensor, device: torch.device, dtypes: Container[torch.dtype]) -> bool:
    """Whether kernels can work on a tensor; not on one that only wraps others, which has no address."""
    has_address = tensor.data_ptr() != 0 or tensor.numel() == 0
    return has_address and tensor.device == device and tensor.dtype in dtypes and tensor.is_contiguous()


def send_addresses(addresses: list[int], device: torch.device) -> Tensor:
    """A table of them on the device. Asynchronous from pinned memory, which the allocator keeps until it is done."""
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def stream_of(device: torch.device) -> int:
    """The stream that work is queued on now; a table is read on the stream that it was sent on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes Triton launch on this device; there is none to choose for host memory, which only its interpreter reads."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TiledBlocks:
    """Grams of blocks, and their products with r x r matrices, in a few launches.

    Args:
        specs: the blocks.
        lora_ranks: r of every pair, by its number in ``specs``.
        slots: of every block, its place in ``[2 P_r]``: the Grams of lora_A, then those of lora_B.
        pairs_by_rank: the pairs of every lora_rank.
        device: where they lie: a CUDA device, or the CPU for Triton's interpreter.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        lora_ranks: Sequence[int],
        slots: Sequence[int],
        pairs_by_rank: Mapping[int, Sequence[int]],
        device: torch.device,
    ) -> None:
        self._specs = specs
        self._lora_ranks = lora_ranks
        self._slots = slots
        self._num_pairs = {lora_rank: len(pairs) for lora_rank, pairs in pairs_by_rank.items()}
        self._device = device
        self._plans: dict[tuple[str, Pattern], _Plan] = {}
        self._located: dict[tuple[str, int], Located] = {}

    def locate(self, purpose: str, blocks: Sequence[Tensor | None]) -> Located | None:
        """Find the blocks; None if kernels cannot work on some: in host memory (an offloaded optimizer's), of 16 bits.

        Args:
            purpose: "grams" or "products".
            blocks: in the order of the specs, contiguous.
        """
        addresses = addresses_of(blocks)
        key = purpose, stream_of(self._device)
        known = self._located.get(key)
        if known is not None and known.addresses == addresses:
            return known
        if not all(map(self._fits, blocks)):
            return None
        plan = self._plan(purpose, tuple(None if block is None else block.dtype for block in blocks))
        table = send_addresses(addresses, self._device)
        aligned = tuple(
            launch.rows_aligned and not any(addresses[member] % 16 for member in launch.members)
            for launch in plan.launches
        )
        self._located[key] = known = Located(addresses, table, plan, aligned)
        return known

    def _fits(self, block: Tensor | None) -> bool:
        return block is None or fits(block, self._device, _TRITON_DTYPES)

    def grams(self, located: Located) -> Matrices:
        """As :meth:`~reflora_dist.algebra.tall_blocks.BlockSet.grams`; launches by shape, dtype and r, one to sum."""
        with launching_on(self._device):
            return self._grams(located)

    def _grams(self, located: Located) -> Matrices:
        sums = located.plan.sums
        partials = {
            lora_rank: torch.empty(plan.order.numel(), lora_rank, lora_rank, dtype=torch.float64, device=self._device)
            for lora_rank, plan in sums.items()
        }
        first = dict.fromkeys(partials, 0)
        for launch, aligned in zip(located.plan.launches, located.aligned, strict=True):
            r, settings = launch.lora_rank, _SETTINGS[padded(launch.lora_rank)]
            gram_kernel[(len(launch.tiles),)](
                located.table, launch.tiles, partials[r], first[r], r, padded(r), settings.gram_width,
                launch.columns, _TRITON_DTYPES[launch.dtype], aligned,
                num_warps=settings.gram_warps, num_stages=3,
            )  # fmt: skip
            first[r] += len(launch.tiles)
        return {lora_rank: self._sum(lora_rank, sums.get(lora_rank), partials) for lora_rank in self._num_pairs}

    def multiply_(self, located: Located, matrices: Matrices) -> None:
        """As :meth:`~reflora_dist.algebra.tall_blocks.BlockSet.multiply_`: a launch per orientation, dtype and r."""
        with launching_on(self._device):
            self._multiply_(located, matrices)

    def _multiply_(self, located: Located, matrices: Matrices) -> None:
        for launch, aligned in zip(located.plan.launches, located.aligned, strict=True):
            r, settings = launch.lora_rank, _SETTINGS[padded(launch.lora_rank)]
            multiply_kernel[(len(launch.tiles),)](
                located.table, launch.tiles, matrices[r].contiguous(), r, padded(r),
                settings.product_width, min(padded(r), 32), launch.columns, _TRITON_DTYPES[launch.dtype], aligned,
                num_warps=settings.product_warps, num_stages=settings.product_stages,
            )  # fmt: skip

    def _sum(self, lora_rank: int, plan: _Sum | None, partials: Mapping[int, Tensor]) -> Tensor:
        pairs, size = self._num_pairs[lora_rank], lora_rank * lora_rank
        if plan is None:  # this rank holds nothing of these pairs
            return torch.zeros(2, pairs, lora_rank, lora_rank, dtype=torch.float64, device=self._device)
        grams = torch.empty(2, pairs, lora_rank, lora_rank, dtype=torch.float64, device=self._device)
        width = min(_SUM_WIDTH, triton.next_power_of_2(size))
        sum_kernel[(2 * pairs, triton.cdiv(size, width))](
            partials[lora_rank], plan.spans, plan.order, grams, size, width, num_warps=4
        )
        return grams

    def _plan(self, purpose: str, pattern: Pattern) -> _Plan:
        if (purpose, pattern) not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            launches = tuple(self._plan_launches(purpose, pattern))
            sums = self._plan_sums(launches) if purpose == "grams" else {}
            self._plans[purpose, pattern] = _Plan(launches, sums)
        return self._plans[purpose, pattern]

    def _plan_launches(self, purpose: str, pattern: Pattern) -> Iterator[_Launch]:
        groups: dict[tuple[bool, int, torch.dtype], list[int]] = {}
        for position, (spec, dtype) in enumerate(zip(self._specs, pattern, strict=True)):
            if dtype is not None:
                key = (spec.columns, self._lora_ranks[spec.pair], dtype)
                groups.setdefault(key, []).append(position)
        for (columns, lora_rank, dtype), members in groups.items():
            rows = _PRODUCT_ROWS if purpose == "products" else _gram_rows(lora_rank)
            lengths = [self._specs[member].rows for member in members]
            tiles = [
                (member, start, min(start + rows, length), length, self._slots[member])
                for member, length in zip(members, lengths, strict=True)
                for start in range(0, length, rows)
            ]
            rows_aligned = not columns or all(length * dtype.itemsize % 16 == 0 for length in lengths)
            table = torch.tensor(tiles, dtype=torch.int32).to(self._device)
            slots = tuple(tile[4] for tile in tiles)
            yield _Launch(columns, lora_rank, dtype, tuple(members), table, slots, rows_aligned)

    def _plan_sums(self, launches: Sequence[_Launch]) -> dict[int, _Sum]:
        tiles_of: dict[int, list[list[int]]] = {}
        for launch in launches:
            pairs = self._num_pairs[launch.lora_rank]
            lists = tiles_of.setdefault(launch.lora_rank, [[] for _ in range(2 * pairs)])
            first = sum(len(entry) for entry in lists)
            for number, slot in enumerate(launch.slots):
                lists[slot].append(first + number)
        plans = {}
        for lora_rank, lists in tiles_of.items():
            ends = torch.tensor([len(entry) for entry in lists]).cumsum(0)
            starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
            order = torch.tensor([tile for entry in lists for tile in entry], dtype=torch.int32)
            spans = torch.stack([starts, ends], dim=1).to(torch.int32)
            plans[lora_rank] = _Sum(spans.to(self._device), order.to(self._device))
        return plans


def solve(
    gram_a: Tensor, gram_b: Tensor, newton_steps: int, converged: float, relative_pivot: float, residual: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``refactorization.solve_refactorization``, in one launch; ``[P, r, r]``, contiguous, on a GPU."""
    pairs, lora_rank, _ = gram_a.shape
    size = padded(lora_rank)
    s, s_inv = torch.empty_like(gram_a), torch.empty_like(gram_a)
    solved = torch.empty(pairs, dtype=torch.int8, device=gram_a.device)
    scratch = torch.empty(pairs, 4, size, size, dtype=torch.float64, device=gram_a.device)
    with launching_on(gram_a.device):
        solve_kernel[(pairs,)](
            gram_a, gram_b, s, s_inv, solved, scratch, lora_rank, size, newton_steps, converged, relative_pivot,
            residual, num_warps=_SETTINGS[size].solve_warps,
        )  # fmt: skip
    return s, s_inv, solved.view(torch.bool)


def invert(matrices: Tensor) -> Tensor:
    """The inverses of ``[..., r, r]`` float64 on a GPU, in one launch; not finite where there is none."""
    lora_rank = matrices.shape[-1]
    size = padded(lora_rank)
    flat = matrices.reshape(-1, lora_rank, lora_rank).contiguous()
    inverses = torch.empty_like(flat)
    scratch = torch.empty(len(flat), size, size, dtype=torch.float64, device=flat.device)
    with launching_on(flat.device):
        invert_kernel[(len(flat),)](flat, inverses, scratch, lora_rank, size, num_warps=_SETTINGS[size].invert_warps)
    return inverses.view(matrices.shape)


class _Settings(NamedTuple):
    gram_width: int
    gram_warps: int
    product_width: int
    product_warps: int
    product_stages: int
    solve_warps: int
    invert_warps: int


# Among the fastest of those tried on an H200 with the shapes of LLaMA-7B, within the memory that _gram_rows allows.
_SETTINGS = {
    16: _Settings(64, 2, 64, 2, 2, 2, 2),
    32: _Settings(64, 2, 64, 2, 2, 4, 4),
    64: _Settings(32, 4, 64, 4, 2, 4, 2),
    128: _Settings(32, 8, 32, 4, 1, 16, 16),  # S of this size is torch's, see LARGEST_SOLVED_LORA_RANK
}
_PRODUCT_ROWS = 256  # of a tall factor, for one program
_MAX_PLANS = 64  # layers that are dropped at random leave ever new sets of gradients


def _gram_rows(lora_rank: int) -> int:
    """How many rows of a tall factor one program sums; its result takes 8 r^2 bytes until all are summed."""
    return min(4 * padded(lora_rank) ** 2, 4096)
