"""The communication of an optimizer step, computed from the layout of the factors: no ranks have to exist."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from ..collectives.tiling import Layout, Tiling, tile
from ..methods.config import RefLoRAConfig
from ..methods.registry import METHODS
from .half import FLAG_BYTES
from .solver import shares_out

_FLOAT64 = 8


class Traffic:
    """The collectives of a step in which a method acts and one firing updates all factors.

    Args:
        config: the method and its settings.
        layouts: the layout of every factor, lora_A and lora_B alternating, as ``Engine.layouts`` returns them.
        ranks: number of ranks that together hold one copy of the factors.
        device: the device of the Gram matrices. CPUs and GPUs solve at different speeds, so they begin to share the
            solve at different sizes.
        element_bytes: bytes per exchanged element; 8 if a factor is float64.
        half: whether gradients are float16 (``Engine.has_half_gradients``).

    Attributes:
        reduced: payload in bytes of the all-reduce of Gram matrices or norms.
        flags: payload in bytes of the all-reduce that tells, for every pair, whether it stays in the range of float16.
        gathered: bytes that each rank gives to the all-gather of the shared solve.
        neighbours: whether ranks exchange only rows that are cut, and only with neighbours.
    """

    def __init__(
        self,
        config: RefLoRAConfig,
        layouts: Sequence[Layout],
        ranks: int,
        device: torch.device,
        element_bytes: int = 4,
        half: bool = False,
    ) -> None:
        self._layouts = layouts
        self._ranks = ranks
        self._element_bytes = element_bytes
        self._method = METHODS[config.method]
        acts = self._method.acts and ranks > 1 and bool(layouts)
        lora_ranks = [layout.lora_rank for layout in layouts[::2] for _ in range(layout.experts)]
        self._there, self._back = self._method.channels(config)
        self.reduced = _FLOAT64 * sum(map(self._method.reduced_values, lora_ranks)) if acts else 0
        self.flags = FLAG_BYTES * (len(layouts) // 2) if half and acts else 0
        self.gathered = 0
        if acts and shares_out(lora_ranks, ranks, device):
            self.gathered = self._gathered(lora_ranks)
        moving = [layout for layout in layouts if layout.moves] if acts and self._there else []
        self._moves = bool(moving)
        self.neighbours = self._moves and not any(layout.columns for layout in moving)
        self._tile = functools.cache(tile)

    @property
    def collectives(self) -> dict[str, int]:
        """Number of collectives by kind. A rank without a cut row takes no part in the exchange with neighbours."""
        counts = {
            "all_reduce": int(self.reduced > 0) + int(self.flags > 0),
            "all_gather": int(self.gathered > 0),
            "all_to_all": 2 * int(self._moves and not self.neighbours),
            "send_recv": 2 * int(self.neighbours),
        }
        return {kind: count for kind, count in counts.items() if count}

    @property
    def sent_in_all_reduces(self) -> int:
        """Bytes that every rank sends in ring all-reduces."""
        return sum(2 * (self._ranks - 1) * payload // self._ranks for payload in (self.reduced, self.flags))

    def sent(self, rank: int) -> int:
        """Return the bytes that a rank sends, as ``Report.bytes_per_step`` counts them."""
        there, back = self.exchanged(rank)
        return self.sent_in_all_reduces + (self._ranks - 1) * self.gathered + there + back

    def exchanged(self, rank: int) -> tuple[int, int]:
        """Return the bytes that a rank sends to others in the exchanges: ``(its own pieces, others' pieces back)``."""
        there = back = 0
        for tiling in self._tilings(rank):
            there += sum(run.numel for run in tiling.sent if run.peer != rank)
            back += sum(run.numel for run in tiling.arriving if run.peer != rank)
        return (
            self._element_bytes * self._there * there,
            self._element_bytes * self._back * back,
        )

    def buffers(self, rank: int) -> int:
        """Return the bytes of the exchanges' buffers on a rank.

        Elements that it sends count once, elements that it receives twice: as they arrive, and copied into blocks.
        """
        sent = received = 0
        for tiling in self._tilings(rank):
            sent += sum(run.numel for run in tiling.sent)
            received += sum(run.numel for run in tiling.arriving)
        return self._element_bytes * self._there * (sent + 2 * received)

    def _tilings(self, rank: int) -> Iterator[Tiling]:
        """Yield the tiling of each factor that this rank owns or holds a part of."""
        for factor, layout in enumerate(self._layouts if self._moves else ()):
            owner = layout.owner(factor // 2, self._ranks) if layout.columns else 0
            if layout.piece(rank).numel or (layout.columns and rank == owner):
                yield self._tile(layout, rank, owner)

    def _gathered(self, lora_ranks: Sequence[int]) -> int:
        """Return the bytes that each rank sends in the all-gather. All send equally many: the last share is padded."""
        shares = {r: -(-lora_ranks.count(r) // self._ranks) for r in set(lora_ranks)}
        return _FLOAT64 * sum(share * self._method.solution_values(r) for r, share in shares.items())
