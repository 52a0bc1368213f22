"""Plans and launches of the kernels for Gram matrices, products, S and inverses."""

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
"""The dtype of every block, None for an absent block."""


@dataclasses.dataclass(frozen=True)
class _Launch:
    """One launch: blocks of one orientation, lora_rank and dtype, and the tiles that its programs work on."""

    columns: bool
    lora_rank: int
    dtype: torch.dtype
    members: tuple[int, ...]  # positions in the list of blocks
    tiles: Tensor  # [programs, 5] int32
    slots: tuple[int, ...]  # place of each tile's Gram in [2 P_r]
    rows_aligned: bool  # rows of every [r, rows] block have a multiple of 16 bytes


@dataclasses.dataclass(frozen=True)
class _Sum:
    """The partial Grams of every Gram of one lora_rank."""

    spans: Tensor  # [2 P_r, 2] int32: the part of `order` for each Gram, first and one past the last
    order: Tensor  # [partials] int32: numbers of partial Grams


@dataclasses.dataclass(frozen=True)
class _Plan:
    launches: tuple[_Launch, ...]
    sums: dict[int, _Sum]  # empty for products


@dataclasses.dataclass(frozen=True)
class Located:
    """Blocks that kernels can work on, with their current addresses, which rarely change between steps."""

    addresses: list[int]
    table: Tensor  # [blocks] int64, the addresses on the device
    plan: _Plan
    aligned: tuple[bool, ...]  # per launch, whether 16-byte accesses are possible


def addresses_of(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return the address of every tensor, 0 for None; ``map`` is the fastest way, and every step calls this."""
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # some are None
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def fits(tensor: Tensor, device: torch.device, dtypes: Container[torch.dtype]) -> bool:
    """Return whether kernels can work on a tensor.

    The tensor must be contiguous, on ``device`` and of one of ``dtypes``. A wrapper subclass has no address.
    """
    has_address = tensor.data_ptr() != 0 or tensor.numel() == 0
    return has_address and tensor.device == device and tensor.dtype in dtypes and tensor.is_contiguous()


def send_addresses(addresses: list[int], device: torch.device) -> Tensor:
    """Return the addresses as ``[tensors]`` int64 on the device.

    The copy is asynchronous, from pinned memory that torch's allocator keeps until the copy is done.
    """
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def stream_of(device: torch.device) -> int:
    """Return the current stream, since kernels must read a table on the stream that copied it; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which Triton launches on this device; it does nothing on a CPU (Triton's interpreter)."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class TiledBlocks:
    """Gram matrices of blocks, and products of blocks with r x r matrices, in a few launches.

    Args:
        specs: pair, side and shape of each block.
        lora_ranks: r of every pair, indexed by ``BlockSpec.pair``.
        slots: the place of each block's Gram in ``[2 P_r]``: lora_A's Grams come first, then lora_B's.
        pairs_by_rank: the pairs of every lora_rank.
        device: the blocks' device: a CUDA device, or the CPU for Triton's interpreter.
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
        """Return the blocks with their addresses on the device, or None if kernels cannot work on some of them.

        Kernels cannot work on 16-bit blocks, nor on blocks in host memory (an offloaded optimizer's).

        Args:
            purpose: "grams" or "products".
            blocks: contiguous tensors in the order of the specs; None for an absent block.
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
        """Return what :meth:`~reflora_dist.algebra.tall_blocks.BlockSet.grams` returns.

        There is one launch per orientation, dtype and r, and one per r to sum the partial Grams.
        """
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
        """Multiply as :meth:`~reflora_dist.algebra.tall_blocks.BlockSet.multiply_` does.

        There is one launch per orientation, dtype and r.
        """
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
        if plan is None:  # this rank has no block of these pairs
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
    """Solve as ``refactorization.solve_refactorization`` does, in one launch.

    Args:
        gram_a: ``A A^T``, ``[P, r, r]`` float64, contiguous, on a GPU.
        gram_b: ``B^T B``, likewise.
        newton_steps: the largest number of Newton steps.
        converged: the relative change of X at which the iteration stops.
        relative_pivot: a Cholesky pivot below this, relative to its diagonal entry, makes a factor rank-deficient.
        residual: the largest residual of a solved pair.

    Returns:
        S and S^-1 ``[P, r, r]`` float64, and ``solved`` ``[P]`` bool.
    """
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
    """Return the inverses of ``[..., r, r]`` float64 on a GPU, in one launch.

    The inverse of a singular matrix is not finite.
    """
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


# Among the fastest settings measured on an H200 with the shapes of LLaMA-7B, within the memory that _gram_rows allows.
_SETTINGS = {
    16: _Settings(64, 2, 64, 2, 2, 2, 2),
    32: _Settings(64, 2, 64, 2, 2, 4, 4),
    64: _Settings(32, 4, 64, 4, 2, 4, 2),
    128: _Settings(32, 8, 32, 4, 1, 16, 16),  # torch computes S of this size: LARGEST_SOLVED_LORA_RANK
}
_PRODUCT_ROWS = 256  # rows of a tall factor per program
_MAX_PLANS = 64  # random layer dropping would add a new set of gradients in almost every step


def _gram_rows(lora_rank: int) -> int:
    """Return the number of rows of a tall factor that one program sums; each partial Gram takes 8 r^2 bytes."""
    return min(4 * padded(lora_rank) ** 2, 4096)
