"""What moves where factors are cut between ranks, and who computes on it: counted from sizes, by the package's rule."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from benchmarks import common
from reflora_dist.solving import message_values
from reflora_dist.tiling import LocalShard, choose_owners

LAYOUTS = ("zero3", "fsdp2")
GRAM_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The LoRA pairs of a model: ``(in, out)`` of each, all of rank r."""

    pairs: tuple[tuple[int, int], ...]
    lora_rank: int

    @classmethod
    def of(cls, shape: common.ModelShape, lora_rank: int) -> Adapters:
        layer = tuple((n_in, n_out) for _, n_in, n_out in shape.adapted_linears())
        return cls(layer * shape.num_layers, lora_rank)

    @property
    def elements_a(self) -> int:
        return self.lora_rank * sum(n_in for n_in, _ in self.pairs)

    @property
    def elements_b(self) -> int:
        return self.lora_rank * sum(n_out for _, n_out in self.pairs)

    @property
    def gram_bytes(self) -> int:
        """Upper triangles of both Grams of every pair."""
        return GRAM_BYTES * len(self.pairs) * self.lora_rank * (self.lora_rank + 1)


@dataclasses.dataclass(frozen=True)
class Retiling:
    """Who holds and who owns what of the factors that are moved: ``[ranks]`` each, elements of one channel.

    Attributes:
        held: what lies on a rank and is given to the pairs' owners.
        owned: what the pairs' owners compute on, wherever it lies.
        kept: what lies on the owner as it is, and counts in both.
        stays: elements that a rank computes on in place.
        spans: stretches of tensors that ``held`` consists of.
        blocks: tensors that ``owned`` is brought into.
        pairs: how many a rank owns.
        message: float32 elements of what is said about a pair, as long as two of float64.
        grain: elements that stay together throughout, at least.
    """

    held: np.ndarray
    owned: np.ndarray
    kept: np.ndarray
    stays: np.ndarray
    spans: np.ndarray
    blocks: np.ndarray
    pairs: np.ndarray
    message: int
    grain: int

    @property
    def messages(self) -> int:
        """How many a rank sends: what is said about all pairs of one owner is one."""
        return int((self.pairs > 0).sum())

    def at_holders(self, channels: int) -> np.ndarray:
        """Elements of so many channels, and of a message about every pair, as they lie before they are sent."""
        return channels * self.held + self.pairs.sum() * self.message

    def at_owners(self, channels: int) -> np.ndarray:
        """The same as they arrive: with a message from every rank about each pair owned."""
        return channels * self.owned + len(self.pairs) * self.pairs * self.message

    def moved(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Of both what comes from or goes to another rank: on the holders' side, and on the owners'."""
        stay = channels * self.kept + self.pairs * self.message
        return self.at_holders(channels) - stay, self.at_owners(channels) - stay


@functools.lru_cache
def retiling(adapters: Adapters, ranks: int, layout: str) -> Retiling:
    """What a step on cut factors moves; ``held`` is zero on all ranks if no factor is cut.

    ZeRO-3 cuts a factor into flat pieces of ``ceil(numel / N)``, FSDP2 into blocks of ``ceil(rows / N)`` rows; lora_B
    then stays whole rows under FSDP2. All of lora_A goes to the pair's owner, chosen by the rule of the package, and so
    do rows of lora_B that are cut.

    Raises:
        ValueError: the layout is not one of LAYOUTS.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    r = adapters.lora_rank
    held, owned, kept, stays, spans, blocks, pairs = np.zeros((7, ranks), np.int64)
    grains, keeps_a = [], False
    for (n_in, n_out), owned_pairs in _owned_pairs(adapters, ranks, layout).items():
        count = owned_pairs.sum()
        pieces_a = np.diff(_bounds((r, n_in), ranks, layout))
        whole = pieces_a.max() == r * n_in
        keeps_a |= bool(whole)
        bounds_b = _bounds((n_out, r), ranks, layout)
        cut = np.stack([np.zeros_like(pieces_a) if whole else pieces_a, *_cut_rows(r, bounds_b)])
        of_pair = cut.sum(axis=0)
        held += count * of_pair
        owned += owned_pairs * of_pair.sum()
        kept += owned_pairs * of_pair
        stays += count * (pieces_a + np.diff(bounds_b) - of_pair)
        spans += count * (cut > 0).sum(axis=0)
        blocks += owned_pairs * (int(not whole) + int(cut[1:].any()))
        pairs += owned_pairs
        grains += cut.ravel().tolist()
    message = 2 * message_values(r, keeps_a)
    grain = int(np.gcd.reduce([message, *grains]))
    return Retiling(held, owned, kept, stays, spans, blocks, pairs, message, grain)


def _owned_pairs(adapters: Adapters, ranks: int, layout: str) -> dict[tuple[int, int], np.ndarray]:
    """Of every kind of pair how many each rank owns, ``[ranks]``."""
    r = adapters.lora_rank
    owned = {pair: np.zeros(ranks, np.int64) for pair in adapters.pairs}
    pieces = [np.diff(_bounds((r, n_in), ranks, layout)).tolist() for n_in, _ in owned]

    @functools.cache  # most of many ranks hold the same
    def shards_of(numels: tuple[int, ...]) -> list[LocalShard]:
        of_kind = dict(zip(owned, numels, strict=True))
        return [shard for pair in adapters.pairs for shard in (LocalShard(of_kind[pair]), LocalShard(0))]

    shards = [shards_of(numels) for numels in zip(*pieces, strict=True)]
    shapes = [shape for n_in, n_out in adapters.pairs for shape in ((r, n_in), (n_out, r))]
    for pair, owner in zip(adapters.pairs, choose_owners(shapes, shards), strict=True):
        owned[pair][owner] += 1
    return owned


def _bounds(shape: tuple[int, int], ranks: int, layout: str) -> np.ndarray:
    """Where the ranks' flat pieces begin and end, ``[ranks + 1]``."""
    units, width = (shape[0] * shape[1], 1) if layout == "zero3" else shape
    return np.minimum(np.arange(ranks + 1) * -(-units // ranks), units) * width


def _cut_rows(width: int, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elements of cut rows at the beginning and at the end of every rank's piece, ``[ranks]`` each."""
    start, stop = bounds[:-1], bounds[1:]
    first_whole = np.minimum(-(-start // width) * width, stop)
    last_whole = np.maximum(stop // width * width, first_whole)
    return first_whole - start, stop - last_whole
