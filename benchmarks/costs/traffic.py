"""Count what each rank sends, holds and computes in a step, from the package's own plan."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter

import numpy as np
import torch

from benchmarks.harness import models
from reflora_dist import RefLoRAConfig
from reflora_dist.collectives.tiling import Layout, tile
from reflora_dist.step.traffic import Traffic

LAYOUTS = ("zero3", "fsdp2")
GRAM_BYTES, FACTOR_BYTES, INDEX_BYTES = 8, 4, 8
METHOD = RefLoRAConfig(method="reflora")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The LoRA pairs of a model: ``(in, out)`` of each, all of rank r."""

    pairs: tuple[tuple[int, int], ...]
    lora_rank: int

    @classmethod
    def of(cls, shape: models.ModelShape, lora_rank: int) -> Adapters:
        layer = tuple((n_in, n_out) for _, n_in, n_out in shape.adapted_linears())
        return cls(layer * shape.num_layers, lora_rank)

    @property
    def elements_a(self) -> int:
        return self.lora_rank * sum(n_in for n_in, _ in self.pairs)

    @property
    def elements_b(self) -> int:
        return self.lora_rank * sum(n_out for _, n_out in self.pairs)

    def layouts(self, engine: str, ranks: int, tall: bool) -> list[Layout]:
        """Return how an engine cuts every factor, lora_A and lora_B alternating.

        ZeRO-3 cuts a stored factor into flat pieces of ``ceil(numel / N)``, FSDP2 into ``ceil(rows / N)`` of its rows.

        Args:
            engine: one of LAYOUTS.
            ranks: N.
            tall: whether lora_A is stored ``[in, r]``.

        Raises:
            ValueError: the engine is not one of LAYOUTS.
        """
        if engine not in LAYOUTS:
            raise ValueError(f"layout={engine!r} is unknown; choose one of {', '.join(LAYOUTS)}")
        layouts = []
        for n_in, n_out in self.pairs:
            for rows, columns in ((n_in, not tall), (n_out, False)):
                whole = Layout(rows, self.lora_rank, columns, chunk=rows * self.lora_rank)
                units, width = (whole.numel, 1) if engine == "zero3" else whole.shape
                layouts.append(whole._replace(chunk=-(-units // ranks) * width))
        return layouts


@dataclasses.dataclass
class Moved:
    """The elements that ranks exchange of one channel (weights or gradients), and compute on.

    Attributes:
        traffic: the package's plan for the whole step.
        held: ``[ranks]``, elements on a rank that go to the rank where their row is whole, possibly the same rank.
        owned: ``[ranks]``, elements that a rank receives in this way.
        kept: ``[ranks]``, elements that stay on their rank. They count in ``held`` and in ``owned``.
        stays: ``[ranks]``, elements that a rank computes on in place.
        spans: ``[ranks]``, number of contiguous parts of ``held``.
        holders, owners: the ranks that hold pieces of flat factors, and those that own such factors.
        peers: for each rank the ranks with which it exchanges cut rows.
        grain: number of elements that always stay together, at least.
    """

    traffic: Traffic
    held: np.ndarray
    owned: np.ndarray
    kept: np.ndarray
    stays: np.ndarray
    spans: np.ndarray
    peers: list[set[int]]
    holders: set[int] = dataclasses.field(default_factory=set)
    owners: set[int] = dataclasses.field(default_factory=set)
    grain: int = 0

    @property
    def anything(self) -> bool:
        return bool(self.held.any())

    @property
    def partners(self) -> int:
        """The largest number of ranks with which one exchanges flat factors, possibly including itself."""
        return max(len(self.holders), len(self.owners))

    def sent(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes that go to other ranks: weights and gradients there, and gradients back."""
        there, back = self.held - self.kept, self.owned - self.kept
        return 2 * FACTOR_BYTES * there, FACTOR_BYTES * back

    def buffers(self) -> np.ndarray:
        """Return the bytes of buffers: what is sent, what arrives (also in the order of blocks), and indices."""
        indices = 3 * INDEX_BYTES * (self.owned // self.grain)
        return 2 * FACTOR_BYTES * (self.held + 2 * self.owned) + indices


@functools.lru_cache
def moved(adapters: Adapters, ranks: int, engine: str, tall: bool, device: str) -> Moved:
    """Count what a step moves, which is nothing if no row is cut. ``device`` is the device of the Gram matrices."""
    layouts = adapters.layouts(engine, ranks, tall)
    traffic = Traffic(METHOD, layouts, ranks, torch.device(device))
    held, owned, kept, stays, spans = np.zeros((5, ranks), np.int64)
    result = Moved(traffic, held, owned, kept, stays, spans, [set() for _ in range(ranks)])
    owners: dict[Layout, Counter[int]] = {}
    for factor, layout in enumerate(layouts):
        owners.setdefault(layout, Counter())[layout.owner(factor // 2, ranks) if layout.columns else 0] += 1
    for layout, pairs in owners.items():
        if layout.columns and layout.moves:
            _count_columns(result, layout, pairs, ranks)
        else:
            _count_rows(result, layout, pairs.total(), ranks)
    result.grain = max(1, result.grain)
    return result


def _count_columns(result: Moved, layout: Layout, owned: Counter[int], ranks: int) -> None:
    """Count flat lora_A: every rank's piece goes to the owner."""
    pieces = np.array([layout.piece(rank).numel for rank in range(ranks)])
    pairs = np.array([owned[rank] for rank in range(ranks)])
    result.held += owned.total() * pieces
    result.owned += pairs * layout.numel
    result.kept += pairs * pieces
    result.spans += owned.total() * (pieces > 0)
    result.holders |= set(np.flatnonzero(pieces).tolist())
    result.owners |= set(owned)
    result.grain = math.gcd(result.grain, *set(pieces.tolist()))


def _count_rows(result: Moved, layout: Layout, count: int, ranks: int) -> None:
    """Count factors by rows: whole rows stay, and a cut row goes to the rank that holds most of it."""
    for rank in range(ranks):
        tiling = tile(layout, rank, 0)
        result.stays[rank] += count * (math.prod(tiling.direct[1]) if tiling.direct else 0)
        result.held[rank] += count * sum(run.numel for run in tiling.sent)
        result.owned[rank] += count * sum(run.numel for run in tiling.arriving)
        result.kept[rank] += count * sum(run.numel for run in tiling.sent if run.peer == rank)
        result.spans[rank] += count * len(tiling.sent)
        result.peers[rank] |= {run.peer for run in (*tiling.sent, *tiling.arriving)} - {rank}
        result.grain = math.gcd(result.grain, *(run.numel for run in tiling.arriving))
