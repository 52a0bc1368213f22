"""Refactored gradients over layouts of all kinds, ranks being threads: as if factors were whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reflora_dist.collectives.tiling import Layout
from reflora_dist.step import solver as solving
from reflora_dist.step.solver import shares_out
from tests.support.solving import CPU, stepped


@st.composite
def cut_pairs(draw):
    """``(layouts, ranks)`` of up to five pairs, each factor somewhere in a buffer that ranks share in equal parts."""
    sizes = st.tuples(st.sampled_from([2, 3, 5]), st.integers(7, 12), st.integers(7, 12), st.booleans())
    ranks = draw(st.integers(1, 4))
    layouts = []
    for r, n_in, n_out, tall in draw(st.lists(sizes, min_size=1, max_size=5)):
        for rows, columns in ((n_in, not tall), (n_out, False)):
            offset = draw(st.integers(0, 60)) if ranks > 1 else 0
            chunk = -(-(offset + rows * r) // ranks) + draw(st.integers(0, 9))
            layouts.append(Layout(rows, r, columns, chunk, offset))
    return layouts, ranks


def _worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(cut_pairs(), st.sampled_from(["reflora", "scaled-gd"]), st.sampled_from([1, 2]))
def test_gradients_are_those_of_whole_factors(cut, method: str, firings: int) -> None:
    """Over random cuts, empty pieces, several lora_ranks and both ways to store lora_A.

    One all-reduce per step; an all-to-all there and back where a flat lora_A is cut, exchanges with neighbours where
    rows are, nothing else.
    """
    layouts, ranks = cut
    found, expected, calls, equal = stepped(layouts, ranks, method, firings)
    assert _worst(found, expected) < 5e-6
    assert equal
    moving = [layout for layout in layouts if layout.moves]
    exchange = "all_to_all" if any(layout.columns for layout in moving) else "send_recv"
    for of_rank in calls:
        assert of_rank.pop("all_reduce", 0) == int(ranks > 1)
        assert set(of_rank) <= ({exchange} if moving else set())
        assert of_rank.get(exchange, 0) <= 2 * firings


@settings(max_examples=20, deadline=None)
@given(cut_pairs())
def test_lora_pro_over_cut_factors(cut) -> None:
    """Its Grams are those of factors and gradients side by side, over rows that were cut, too."""
    layouts, ranks = cut
    found, expected, _, _ = stepped(layouts, ranks, "lora-pro")
    assert _worst(found, expected) < 1e-4  # float32 gradients of which nearly all cancels


@pytest.mark.parametrize("method", ["reflora", "scaled-gd", "lora-pro"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_shared_solve_gives_the_same(monkeypatch: pytest.MonkeyPatch, method: str, ranks: int) -> None:
    """Every rank solves for some pairs of each r, for none of the last; one all-gather tells the others."""
    monkeypatch.setitem(solving._DEAR_WORK, "cpu", 0)
    monkeypatch.setattr(solving, "_LEAST_SHARE", 1)
    layouts = []
    for r in (2, 3, 3, 3, 5):
        layouts += [Layout(rows, r, False, chunk=-(-rows // ranks) * r) for rows in (11, 9)]
    found, expected, calls, equal = stepped(layouts, ranks, method)
    assert _worst(found, expected) < (1e-4 if method == "lora-pro" else 5e-6)
    assert equal
    assert calls == [{"all_reduce": 1, "all_gather": 1}] * ranks


def test_the_rule_of_the_shared_solve() -> None:
    """Where it is dear, and every rank gets four pairs: never for few pairs, small ones, or on one rank."""
    llama_7b = [16] * 224
    gpu = torch.device("cuda")
    assert not shares_out(llama_7b, 64, CPU) and not shares_out(llama_7b, 8, gpu)
    assert shares_out([64] * 224, 8, gpu) and not shares_out([64] * 224, 64, gpu)
    assert shares_out([64] * 56, 4, CPU) and not shares_out([16] * 56, 4, CPU)
    assert not shares_out([64] * 56, 1, CPU)


def test_a_rank_may_hold_nothing() -> None:
    layouts = [Layout(7, 5, True, chunk=20), Layout(7, 5, False, chunk=35)]
    found, expected, _, _ = stepped(layouts, 3, steps=3)
    assert _worst(found, expected) < 5e-6


def test_the_check_can_fail() -> None:
    """Plain gradients are far from refactored ones."""
    layouts = [Layout(7, 5, False, chunk=20), Layout(7, 5, False, chunk=35)]
    found, _, _, _ = stepped(layouts, 2, steps=0)
    _, expected, _, _ = stepped(layouts, 2)
    assert _worst(found, expected) > 0.1
