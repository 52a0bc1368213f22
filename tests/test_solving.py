"""Refactored gradients over layouts of all kinds, ranks being threads: as if factors were whole."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflora_dist import RefLoRAConfig
from reflora_dist.methods import GRADIENT_METHODS
from reflora_dist.refactor import solve_with_torch
from reflora_dist.retile import Retiler
from reflora_dist.solving import AtOwners, Everywhere, message_values
from reflora_dist.tiling import FOLLOWING, LocalShard, follow_each_other
from tests.threads import ThreadRank, run_threads

CPU = torch.device("cpu")


@st.composite
def layouts(draw):
    """``(pairs, shards)``: ``(r, in, out)`` of each, and what every rank holds of every factor, cut anywhere."""
    pairs = draw(
        st.lists(st.tuples(st.sampled_from([2, 3, 5]), st.integers(7, 12), st.integers(7, 12)), min_size=1, max_size=5)
    )
    world_size = draw(st.integers(1, 4))
    by_factor = []
    for r, n_in, n_out in pairs:
        for numel in (r * n_in, r * n_out):
            cuts = sorted(draw(st.lists(st.integers(0, numel), min_size=world_size - 1, max_size=world_size - 1)))
            by_factor.append([LocalShard(b - a, a) for a, b in itertools.pairwise([0, *cuts, numel])])
    return pairs, [list(of_rank) for of_rank in zip(*by_factor, strict=True)]


def refactored(
    pairs: Any,
    shards: Any,
    device: torch.device = CPU,
    steps: int = 1,
    ahead: bool = False,
    later_steps: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Any:
    """Whole gradients as ``steps`` steps of all ranks leave them, and as they should be; ranks' collectives.

    Every step refactors the gradients of the one before. With ``ahead`` it is solved first, and applied then in two
    firings: of the first half of the factors, and of the rest. Steps after the first run in ``later_steps``.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for r, n_in, n_out in pairs for shape in ((r, n_in), (n_out, r))]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    lora_ranks = [r for r, _, _ in pairs]

    def pieces(tensors: list[Tensor], rank: int) -> list[Tensor]:
        held = zip(tensors, shards[rank], strict=True)
        return [tensor.flatten()[shard.start : shard.stop].clone().to(device) for tensor, shard in held]

    def run(comm: ThreadRank) -> tuple[list[Tensor], dict[str, int]]:
        retiler = Retiler(shapes, shards, comm, message_values=message_values)
        method = GRADIENT_METHODS["reflora"](RefLoRAConfig(), {})
        solver: Any = Everywhere(method, retiler, lora_ranks, device)
        if retiler.cut:
            solver = AtOwners(method, retiler, lora_ranks, comm)
        own_weights, own_gradients = pieces(weights, comm.rank), pieces(gradients, comm.rank)
        half = len(shapes) // 2
        solved: list[Tensor] = []
        with contextlib.ExitStack() as context:
            for step in range(steps):
                if step == 1:  # the context may be one of the process: all have planned, and one enters for all
                    comm.meet()
                    if comm.rank == 0:
                        context.enter_context(later_steps())
                    comm.meet()
                comm.start_step()
                if ahead:
                    solution = solver.solve(own_weights, comm)
                    for first in (True, False):
                        present = [(factor < half) == first for factor in range(len(shapes))]
                        solver.apply(solution, own_gradients, present)
                else:
                    solution = solver.solve_and_apply(own_weights, own_gradients, [True] * len(shapes), comm)
                solved += solution.whole.solved.values()
            comm.meet()
        comm.meet()
        assert all(flags.all() for flags in solved)
        return [gradient.cpu() for gradient in own_gradients], comm.calls

    results = run_threads(run, len(shards), device)
    whole = []
    for factor, shape in enumerate(shapes):
        parts = sorted(
            (shards[rank][factor].start, results[rank][0][factor])
            for rank in range(len(shards))
            if shards[rank][factor].numel
        )
        whole.append(torch.cat([part for _, part in parts]).view(shape))
    expected = [gradient.double() for gradient in gradients]
    for pair in range(len(pairs)):
        a, b = weights[2 * pair].double(), weights[2 * pair + 1].double()
        s, s_inv, _ = solve_with_torch((a @ a.mT)[None], (b.mT @ b)[None])
        for _ in range(steps):
            expected[2 * pair], expected[2 * pair + 1] = s_inv[0] @ expected[2 * pair], expected[2 * pair + 1] @ s[0]
    return whole, expected, [calls for _, calls in results]


def _worst(whole: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(whole, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.booleans())
def test_gradients_are_those_of_whole_factors(layout, ahead: bool) -> None:
    """Over random cuts, empty pieces and several lora_ranks; whatever is cut takes two all-to-alls per step."""
    pairs, shards = layout
    shapes = [shape for r, n_in, n_out in pairs for shape in ((r, n_in), (n_out, r))]
    cut = Retiler(shapes, shards, ThreadRank(0, [None] * len(shards), None, CPU)).cut
    if len(shards) > 1 and not cut:
        return  # summed by an all-reduce, which threads do not have
    whole, expected, calls = refactored(pairs, shards, steps=2, ahead=ahead)
    assert _worst(whole, expected) < 5e-6
    if cut and not ahead:
        assert calls == [{"all_to_all": 2}] * len(shards)


def test_a_rank_may_hold_whole_factors_where_others_share_a_row() -> None:
    """Nothing of what the first rank holds is cut, and yet it takes part: it owns the pair with the cut row."""
    pieces = [[8, 10, 15, 3], [0, 0, 0, 17], [0, 0, 0, 16]]
    shards = follow_each_other([[LocalShard(numel, FOLLOWING) for numel in of_rank] for of_rank in pieces])
    whole, expected, calls = refactored([(2, 4, 5), (3, 5, 12)], shards, steps=2)
    assert _worst(whole, expected) < 5e-6
    assert calls == [{"all_to_all": 2}] * 3


@pytest.mark.parametrize("ahead", [False, True])
def test_a_rank_may_hold_and_own_nothing(ahead: bool) -> None:
    shards = [
        [LocalShard(15), LocalShard(20)],
        [LocalShard(0, 15), LocalShard(0, 20)],
        [LocalShard(20, 15), LocalShard(15, 20)],
    ]
    whole, expected, _ = refactored([(5, 7, 7)], shards, steps=3, ahead=ahead)
    assert _worst(whole, expected) < 5e-6
