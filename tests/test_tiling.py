"""Re-tiling plans, over random shapes, cuts and numbers of ranks; and the exchange itself, simulated."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reflora_dist.blocks import SIDE_A, SIDE_B
from reflora_dist.communication import Communicator
from reflora_dist.retile import Retiler
from reflora_dist.solving import message_values
from reflora_dist.tiling import FOLLOWING, LocalShard, choose_owners, follow_each_other, head, tile


@st.composite
def cut_factors(draw):
    """``(side, shape, shards, owner)``: a factor cut anywhere into up to 7 pieces, some of them empty."""
    side = draw(st.sampled_from([SIDE_A, SIDE_B]))
    lora_rank, features = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    shape = (lora_rank, features) if side == SIDE_A else (features, lora_rank)
    numel = lora_rank * features
    cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=6)))
    bounds = [0, *cuts, numel]
    shards = [LocalShard(stop - start, start) for start, stop in itertools.pairwise(bounds)]
    return side, shape, draw(st.permutations(shards)), draw(st.integers(0, len(shards) - 1))


@settings(max_examples=300, deadline=None)
@given(cut_factors())
def test_every_row_is_whole_on_exactly_one_rank(cut) -> None:
    """Following every element through the plan puts each where its tall row is, once, with nothing left over."""
    side, shape, shards, owner = cut
    whole = torch.arange(shape[0] * shape[1])
    tilings = [tile(side, shape, shards, rank, owner) for rank in range(len(shards))]
    assert all(tiling.received is None or rank == owner for rank, tiling in enumerate(tilings))
    assert len({tiling.exchanged for tiling in tilings}) == 1
    pieces = [whole[shard.start : shard.stop] for shard in shards]
    rows = []
    for rank, tiling in enumerate(tilings):
        if tiling.direct is not None:
            offset, block_shape = tiling.direct
            rows.append(_tall(side, pieces[rank][offset : offset + block_shape[0] * block_shape[1]].view(block_shape)))
        if tiling.received is not None:
            rows.append(_tall(side, _receive(rank, tilings, pieces).view(tiling.received)))
    tall = _tall(side, whole.view(shape))
    received = torch.cat(rows)
    assert torch.equal(received[received[:, 0].argsort()], tall[tall[:, 0].argsort()])


def _tall(side: int, block: torch.Tensor) -> torch.Tensor:
    return block.T if side == SIDE_A else block


def _receive(rank: int, tilings, pieces) -> torch.Tensor:
    """What the all-to-all brings: from every rank, in order, the elements that it sends here."""
    wire = {
        source: torch.cat(
            [piece[run.start : run.start + run.numel] for run in other.sent if run.peer == rank] or [piece[:0]]
        )
        for source, (other, piece) in enumerate(zip(tilings, pieces, strict=True))
    }
    arriving = tilings[rank].arriving
    assert [run.start for run in arriving] == list(itertools.accumulate([0, *(r.numel for r in arriving)]))[:-1]
    block = []
    for run in arriving:
        block.append(wire[run.peer][: run.numel])
        wire[run.peer] = wire[run.peer][run.numel :]
    assert not any(len(left) for left in wire.values())
    return torch.cat(block)


@pytest.mark.parametrize(("layout", "world_size"), [("zero3", 2), ("zero3", 7), ("fsdp2", 4), ("fsdp2", 64)])
def test_ranks_own_equal_shares(layout: str, world_size: int) -> None:
    """No rank owns more of all lora_A than its share and one more of the largest."""
    shapes = _llama_70b()
    owners = choose_owners(shapes, follow_each_other(_shards(layout, shapes, world_size)))
    elements = [0] * world_size
    for owner, (rows, columns) in zip(owners, shapes[::2], strict=True):
        elements[owner] += rows * columns
    assert max(elements) <= sum(elements) / world_size + max(rows * columns for rows, columns in shapes[::2])


def test_who_holds_most_of_lora_a_owns_the_pair() -> None:
    """As under ZeRO-2, where few factors are cut; equal holders take turns, and so they do for whole columns."""
    shapes = [(4, 8), (8, 4)] * 4
    pieces = [[(20, 12), (32, 0), (0, 32), (16, 16)][pair] for pair in range(4)]
    shards = [[s for mine in pieces for s in (LocalShard(mine[rank]), LocalShard(16))] for rank in (0, 1)]
    assert choose_owners(shapes, shards) == [0, 0, 1, 1]
    tall = [[LocalShard(16, tall=True), LocalShard(16)] * 4] * 2
    assert choose_owners(shapes, tall) == [0, 1, 0, 1]


def test_a_whole_factor_on_one_rank_does_not_move() -> None:
    shards = [LocalShard(0, 0), LocalShard(12, 0)]
    assert [tile(SIDE_A, (3, 4), shards, rank, 0).exchanged for rank in (0, 1)] == [False, False]
    assert tile(SIDE_A, (3, 4), shards, 1, 0).direct == (0, (3, 4))


def test_tall_shards_do_not_move() -> None:
    shards = [LocalShard(6, FOLLOWING, tall=True), LocalShard(3, FOLLOWING, tall=True), LocalShard(0, tall=True)]
    assert tile(SIDE_A, (3, 3), shards, 0, 0).direct == (0, (3, 2))
    assert tile(SIDE_A, (3, 3), shards, 2, 0).direct is None


def test_following_pieces_are_placed_by_rank() -> None:
    placed = follow_each_other([[LocalShard(5, FOLLOWING)], [LocalShard(0, FOLLOWING)], [LocalShard(7, FOLLOWING)]])
    assert [shards[0].start for shards in placed] == [0, 5, 5]


@pytest.mark.parametrize(
    "shards",
    [
        [LocalShard(6, 0), LocalShard(5, 6)],  # too short
        [LocalShard(6, 0), LocalShard(6, 5)],  # overlapping
        [LocalShard(6, 0), LocalShard(5, 7)],  # a gap
        [LocalShard(12, 0, tall=True), LocalShard(12, 0, tall=True)],
    ],
)
def test_pieces_that_do_not_tile_are_refused(shards) -> None:
    with pytest.raises(ValueError, match=r"do not tile|ranks hold"):
        tile(SIDE_A, (3, 4), shards, 0, 0)


class _Ranks(Communicator):
    """A communicator for planning only."""

    def __init__(self, world_size: int, rank: int) -> None:
        super().__init__(None, torch.device("cpu"))
        self.world_size, self.rank = world_size, rank


def _llama_70b(lora_rank: int = 16) -> list[tuple[int, int]]:
    """Shapes of both factors of all 560 adapters of a LLaMA-70B."""
    hidden, wide, keys = 8192, 28672, 1024
    linears = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    linears += [(hidden, wide), (hidden, wide), (wide, hidden)]
    return [shape for _ in range(80) for i, o in linears for shape in ((lora_rank, i), (o, lora_rank))]


def _shards(layout: str, shapes: list[tuple[int, int]], world_size: int) -> list[list[LocalShard]]:
    def pieces(rank: int) -> list[LocalShard]:
        shards = []
        for side, (rows, columns) in zip(itertools.cycle((SIDE_A, SIDE_B)), shapes, strict=False):
            if layout == "zero3":  # equal pieces of every factor, the last ones padded
                size = -(-rows * columns // world_size)
                start = min(rank * size, rows * columns)
                shards.append(LocalShard(min(size, rows * columns - start), start))
            else:  # fsdp2: chunks of rows
                chunk = -(-rows // world_size)
                held = max(0, min(chunk, rows - rank * chunk)) * columns
                shards.append(LocalShard(held, FOLLOWING, tall=side == SIDE_B))
        return shards

    return [pieces(rank) for rank in range(world_size)]


@pytest.mark.parametrize("layout", ["zero3", "fsdp2"])
@pytest.mark.parametrize("world_size", [8, 64])
def test_planning_for_70b_is_quick_and_small(layout: str, world_size: int) -> None:
    """560 adapters are planned in seconds, with index tensors no larger than what the rank holds."""
    shapes = _llama_70b()
    shards = _shards(layout, shapes, world_size)
    rank = 3
    start = time.perf_counter()
    ranks = _Ranks(world_size, rank)
    retiler = Retiler(shapes, follow_each_other(shards), ranks, message_values=message_values)
    factors, messages = (True,) * len(shapes), (True,) * len(retiler.messages)
    there = retiler._exchange([factors + messages, factors])
    back = retiler._exchange([(False,) * len(shapes) + messages, factors])
    indices = [there._unpack, back._pack]
    assert time.perf_counter() - start < 5
    held_bytes = 4 * sum(shard.numel for shard in shards[rank])
    assert 0 < sum(index.numel() * index.element_size() for index in indices) <= held_bytes


@pytest.mark.parametrize("count", [1, 7, 11, 37, 60])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("side", [SIDE_A, SIDE_B])
def test_the_head_of_a_factor_is_found_in_its_shards(side: int, tall: bool, count: int) -> None:
    """Every one of the first elements in exactly one shard, at the place where it lies, also over several rows."""
    shape = (6, 12) if side == SIDE_A else (12, 6)
    whole = torch.arange(72).view(shape)
    if tall:
        parts = [part.contiguous() for part in whole.split([5, 0, 4, 3], dim=1 - side)]
    else:
        parts = list(whole.flatten().split([31, 0, 2, 39]))
    shards = follow_each_other([[LocalShard(part.numel(), FOLLOWING, tall)] for part in parts])
    found = []
    for part, (shard,) in zip(parts, shards, strict=True):
        for start, position, numel in head(side, shape, shard, count):
            assert part.flatten()[start : start + numel].tolist() == list(range(position, position + numel))
            found += range(position, position + numel)
    assert sorted(found) == list(range(count))
