"""Plans of who computes on which rows, over random shapes, cuts and numbers of ranks; and the exchange, simulated."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reflora_dist.collectives.communicator import Communicator
from reflora_dist.collectives.retile import Retiler
from reflora_dist.collectives.tiling import Layout, head, tile
from tests.support.threads import ThreadRank


@st.composite
def layouts(draw, columns: bool | None = None):
    """``(layout, ranks)``: a factor in a buffer that up to 7 ranks share in equal parts, some of them without any."""
    columns = draw(st.booleans()) if columns is None else columns
    lora_rank, rows = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    ranks, offset = draw(st.integers(1, 7)), draw(st.integers(0, 100))
    least = -(-(offset + rows * lora_rank) // ranks)
    return Layout(rows, lora_rank, columns, chunk=least + draw(st.integers(0, 20)), offset=offset), ranks


@settings(max_examples=300, deadline=None)
@given(layouts(), st.integers(0, 6))
def test_every_row_is_whole_on_exactly_one_rank(cut, owner: int) -> None:
    """Following every element through the plan puts each where its tall row is, once, with nothing left over."""
    layout, ranks = cut
    owner %= ranks
    whole = torch.arange(layout.numel)
    tilings = [tile(layout, rank, owner) for rank in range(ranks)]
    pieces = [whole[layout.piece(rank).start : layout.piece(rank).stop] for rank in range(ranks)]
    assert sum(len(piece) for piece in pieces) == layout.numel
    assert layout.moves == any(tiling.sent for tiling in tilings)
    rows = []
    for rank, tiling in enumerate(tilings):
        if tiling.direct is not None:
            offset, shape = tiling.direct
            rows.append(_tall(layout, pieces[rank][offset : offset + shape[0] * shape[1]].view(shape)))
        if tiling.received is not None:
            rows.append(_tall(layout, _receive(rank, tilings, pieces).view(tiling.received)))
    tall = _tall(layout, whole.view(layout.shape))
    received = torch.cat(rows)
    assert torch.equal(received[received[:, 0].argsort()], tall[tall[:, 0].argsort()])


def _tall(layout: Layout, block: torch.Tensor) -> torch.Tensor:
    return block.T if layout.columns else block


def _receive(rank: int, tilings, pieces) -> torch.Tensor:
    """What the exchange brings: from every rank, in order, the elements that it sends here."""
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


@settings(max_examples=200, deadline=None)
@given(layouts(columns=False))
def test_a_cut_row_goes_to_the_neighbour_that_holds_most_of_it(cut) -> None:
    """Where pieces are at least as long as a row, a rank has two neighbours at most, and sends less than two rows."""
    layout, ranks = cut
    for rank in range(ranks):
        tiling = tile(layout, rank, 0)
        for run in tiling.sent:
            row = (layout.piece(rank).start + run.start) // layout.lora_rank
            parts = layout.overlaps(row * layout.lora_rank, (row + 1) * layout.lora_rank)
            held = {part.peer: part.numel for part in parts}
            assert sum(held.values()) == layout.lora_rank
            assert held[run.peer] == max(held.values())
        if layout.chunk >= layout.lora_rank:
            peers = {run.peer for run in (*tiling.sent, *tiling.arriving)} - {rank}
            assert peers <= {rank - 1, rank + 1}
            assert sum(run.numel for run in tiling.sent if run.peer != rank) <= layout.lora_rank


def test_a_whole_factor_on_one_rank_does_not_move() -> None:
    layout = Layout(4, 3, columns=True, chunk=40, offset=40)
    assert not layout.moves
    assert [tile(layout, rank, 0).direct for rank in (0, 1, 2)] == [None, (0, (3, 4)), None]


def test_whole_columns_do_not_move() -> None:
    """As under FSDP2 with Shard(1) on ``[r, in]``: three columns on two ranks."""
    layout = Layout(3, 3, columns=True, chunk=6, by_rows=True)
    assert not layout.moves
    assert [tile(layout, rank, 0).direct for rank in (0, 1, 2)] == [(0, (3, 2)), (0, (3, 1)), None]


def test_rows_that_divide_do_not_move() -> None:
    assert not Layout(12, 4, columns=False, chunk=16).moves
    assert not Layout(12, 4, columns=False, chunk=8, offset=8).moves
    assert Layout(12, 4, columns=False, chunk=16, offset=2).moves
    assert Layout(12, 4, columns=False, chunk=18).moves
    assert Layout(12, 4, columns=True, chunk=16).moves


def test_who_holds_most_of_a_factor_owns_it() -> None:
    """As under ZeRO-2, where few factors are cut; of those that nobody holds most of, ranks take turns."""
    assert [Layout(8, 4, columns=True, chunk=44, offset=offset).owner(5, 3) for offset in (0, 20, 36, 100)] == [
        0,
        0,
        1,
        2,
    ]
    assert [Layout(8, 4, columns=True, chunk=8).owner(pair, 4) for pair in range(6)] == [0, 1, 2, 3, 0, 1]


def test_a_layout_that_needs_more_ranks_is_refused() -> None:
    layout = Layout(8, 4, columns=False, chunk=8)
    with pytest.raises(ValueError, match="does not fit on 3 ranks"):
        Retiler([layout, layout], _ranks(3, 0))


def _ranks(world_size: int, rank: int) -> Communicator:
    """For planning only."""
    return ThreadRank(rank, [None] * world_size, None, torch.device("cpu"))


def _llama_70b(cut: str, world_size: int, tall: bool, lora_rank: int = 16) -> list[Layout]:
    """Both factors of all 560 adapters of a LLaMA-70B."""
    hidden, wide, keys = 8192, 28672, 1024
    linears = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    linears += [(hidden, wide), (hidden, wide), (wide, hidden)]
    layouts = []
    for n_in, n_out in 80 * linears:
        for rows, columns in ((n_in, not tall), (n_out, False)):
            numel = rows * lora_rank
            first = lora_rank if columns else rows
            chunk = -(-numel // world_size) if cut == "zero3" else -(-first // world_size) * (numel // first)
            layouts.append(Layout(rows, lora_rank, columns, chunk))
    return layouts


@pytest.mark.parametrize("cut", ["zero3", "fsdp2"])
@pytest.mark.parametrize("world_size", [8, 64, 4096])
@pytest.mark.parametrize("tall", [True, False])
def test_planning_for_70b_is_quick_and_small(cut: str, world_size: int, tall: bool) -> None:
    """560 adapters are planned within a second, with index tensors no larger than what the rank computes on."""
    layouts = _llama_70b(cut, world_size, tall)
    start = time.perf_counter()
    retiler = Retiler(layouts, _ranks(world_size, 3))
    everything = (True,) * len(layouts)
    exchange = retiler._exchange([everything, everything])
    indices = [exchange._unpack, exchange._pack]
    assert time.perf_counter() - start < 1
    # at powers of two no row is cut, until the 1024 rows of lora_B of a key are shorter than the ranks are many
    assert retiler.moves == (not tall or (cut, world_size) == ("zero3", 4096))
    elements = sum(spec.shape[0] * spec.shape[1] for spec in retiler.specs)
    assert sum(index.numel() for index in indices) <= 4 * elements


@pytest.mark.parametrize("world_size", [24, 1000])
def test_cut_rows_of_7b_are_few_and_among_neighbours(world_size: int) -> None:
    """At a number of ranks that divides nothing: two peers, and under 100 KB from any rank, there and back."""
    layouts = [layout for layout in _llama_70b("zero3", world_size, tall=True)[: 2 * 224]]
    for rank in (0, world_size // 2, world_size - 1):
        retiler = Retiler(layouts, _ranks(world_size, rank))
        assert retiler.moves and retiler._among_neighbours
        everything = (True,) * len(layouts)
        exchange = retiler._exchange([everything, everything])
        peers = {*exchange._send_counts, *exchange._incoming.counts} - {rank}
        assert peers <= {rank - 1, rank + 1}
        there = sum(count for peer, count in exchange._send_counts.items() if peer != rank)
        assert 4 * there < 100_000


@pytest.mark.parametrize("count", [1, 7, 11, 37, 60])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_the_head_of_a_factor_is_found_in_its_pieces(columns: bool, by_rows: bool, count: int) -> None:
    """Every one of the first elements in exactly one piece, at the place where it lies, also over several rows."""
    layout = Layout(12, 6, columns, chunk=30, by_rows=by_rows)
    whole = torch.arange(72).view(layout.shape)
    if by_rows:
        parts = [part.contiguous() for part in whole.split(5, dim=1 if columns else 0)]
    else:
        parts = list(whole.flatten().split(30))
    found = []
    for rank, part in enumerate(parts):
        for start, position, numel in head(layout, rank, count):
            assert part.flatten()[start : start + numel].tolist() == list(range(position, position + numel))
            found += range(position, position + numel)
    assert sorted(found) == list(range(count))
