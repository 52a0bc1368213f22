"""The plan of what a step sends, held against what ranks report of real steps; and figures of a large model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from reflora_dist import RefLoRAConfig, attach, tall_adapters
from reflora_dist.collectives.tiling import Layout
from reflora_dist.step import solver as solving
from reflora_dist.step.traffic import Traffic
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.workloads import build_model, synthetic_workload, with_method

CPU = torch.device("cpu")
METHODS = ("reflora", "lora-pro", "lora-rite", "lora-muon", "reflora-s", "balora", "balora with moments")


# of which every engine cuts a lora_A: those of ZeRO-2 and FSDP1 lie in few buffers, which are cut in few places
TARGETS = {("fsdp1-full", 2): ["k_proj", "v_proj", "gate_proj"]}
OTHERS = ["q_proj", "k_proj", "o_proj"]


def _stepped(
    engine_name: str, method: str, tall: bool, dtype: torch.dtype = torch.float32, **lora: Any
) -> dict[str, Any]:
    """What this rank reports of one step, and the plan from the layouts that its engine found."""
    workload = synthetic_workload(steps=1, llama={"num_hidden_layers": 1} if lora else None, lora=lora)
    model = build_model(workload, dtype=dtype)
    if tall:
        tall_adapters(model)
    handles = []

    def hook(model: Any, optimizer: Any) -> Any:
        name, _, moments = method.partition(" with ")
        config = RefLoRAConfig(method=name, warmup_steps=0, carry_moments=bool(moments))
        handles.append(attach(model, optimizer, config))
        return handles[0]

    settings = with_method(workload.settings, method)
    ENGINES[engine_name].train(model, workload.batches, settings, hook)
    handle = handles[0]
    engine, report = handle._engine, handle.report()
    assert report.layout == ("tall" if tall else "flat") and report.applied_steps == 1
    layouts, ranks = engine.layouts(), report.world_size
    traffic = Traffic(handle.config, layouts, ranks, CPU, half=engine.has_half_gradients())
    rank = torch.distributed.get_rank()
    return {
        "label": (engine_name, method, "tall" if tall else "flat"),
        "layouts": layouts,
        "reported": (report.bytes_per_step, report.collectives_per_step),
        "planned": (traffic.sent(rank), traffic.collectives),
        "exchanged": traffic.exchanged(rank),
        "reduced": traffic.reduced,
        "flags": traffic.flags,
        "neighbours": traffic.neighbours,
    }


def _all_steps(rank: int, world_size: int, engine_name: str, shared: bool) -> list[dict[str, Any]]:
    if shared:  # as if the solve of these small pairs were dear
        solving._DEAR_WORK["cpu"] = 0.0
        return [_stepped(engine_name, method, tall=True) for method in ("reflora", "lora-pro", "balora")]
    lora = {"r": 20, "target_modules": TARGETS.get((engine_name, world_size), OTHERS)}
    return [_stepped(engine_name, method, tall, **lora) for method in METHODS for tall in (True, False)]


def _check(outcome: dict[str, Any]) -> None:
    sent, collectives = outcome["planned"]
    if not any(outcome["exchanged"]):  # a rank that has no cut row names no neighbour
        collectives = {kind: count for kind, count in collectives.items() if kind != "send_recv"}
    assert (sent, collectives) == outcome["reported"], outcome["label"]


@functools.cache
def _outcomes(engine_name: str, world_size: int) -> list[list[dict[str, Any]]]:
    return run_ranks(_all_steps, world_size, engine_name, False)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("engine_name", ["fsdp2", "zero2", "zero3", "fsdp1-full"])
def test_a_step_sends_what_is_planned(engine_name: str, world_size: int) -> None:
    """Every rank's bytes and collectives, for every method, lora_A tall and flat; and all ranks plan the same."""
    ranks = _outcomes(engine_name, world_size)
    for outcomes in zip(*ranks, strict=True):
        first, label = outcomes[0], outcomes[0]["label"]
        for outcome in outcomes:
            _check(outcome)
            assert (outcome["layouts"], outcome["planned"][1]) == (first["layouts"], first["planned"][1])
        there, back = (sum(outcome["exchanged"][way] for outcome in outcomes) for way in (0, 1))
        _, method, stored = label
        # weights and gradients (LoRA-Muon: moments) go there; LoRA-RITE's moments, too, which return with the weights;
        # BaLoRA's weights and what moments it carries along go both ways
        both_ways = {"reflora-s": (0, 0), "balora": (1, 1), "balora with moments": (3, 3)}
        channels = {"lora-rite": (3, 2), **both_ways}.get(method, (2, 1))
        assert there * channels[1] == back * channels[0]
        expected = {"all_reduce": 1}
        if there:
            expected["send_recv" if first["neighbours"] else "all_to_all"] = 2
        assert first["planned"][1] == expected, label
        assert first["neighbours"] == (bool(there) and stored == "tall")
        if stored == "flat" and method != "reflora-s":
            assert there, label
        if engine_name == "fsdp2" and stored == "tall":
            assert not there, label


def test_neighbours_were_among_them() -> None:
    """Where ZeRO-3 cuts on three ranks; both of a rank that sends its part of a row, and of one that gets the rest."""
    cut = [outcome for of_rank in _outcomes("zero3", 3) for outcome in of_rank if outcome["neighbours"]]
    assert {outcome["label"][1] for outcome in cut} == {*METHODS} - {"reflora-s"}
    assert any(outcome["exchanged"][0] for outcome in cut) and any(outcome["exchanged"][1] for outcome in cut)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_shared_solve_is_gathered(world_size: int) -> None:
    """Where it is dear: upper triangles; of a method that uses gradients whole matrices."""
    share = -(-14 // world_size)  # of the pairs
    values = {"reflora": 8 * 9 + 1, "lora-pro": 2 * 16 * 8 + 1, "balora": 2 * 8 * 8 + 1}  # r = 8
    for outcomes in run_ranks(_all_steps, world_size, "zero3", True):
        for outcome in outcomes:
            _check(outcome)
            sent, collectives = outcome["planned"]
            assert collectives["all_gather"] == 1
            gathered = 8 * share * values[outcome["label"][1]] * (world_size - 1)
            reduced = 2 * (world_size - 1) * outcome["reduced"] // world_size
            assert sent == reduced + gathered + sum(outcome["exchanged"])


def _half_steps(rank: int, world_size: int, tall: bool) -> list[dict[str, Any]]:
    lora = {"r": 20, "target_modules": OTHERS}
    return [_stepped("fsdp2", method, tall, torch.float16, **lora) for method in METHODS]


@pytest.mark.parametrize("tall", [True, False], ids=["tall", "flat"])
def test_of_float16_a_flag_per_pair_is_reduced(tall: bool) -> None:
    """By every method, in an all-reduce of its own."""
    for outcomes in run_ranks(_half_steps, 2, tall):
        for outcome in outcomes:
            _check(outcome)
            assert outcome["planned"][1]["all_reduce"] == 2
            assert outcome["flags"] == 4 * len(OTHERS)


def _llama_7b(engine: str, tall: bool, ranks: int, r: int = 16) -> list[Layout]:
    """All 224 linear layers, from their sizes alone."""
    layouts = []
    for n_in, n_out in 32 * [*4 * [(4096, 4096)], *2 * [(4096, 11008)], (11008, 4096)]:
        for rows, columns in ((n_in, not tall), (n_out, False)):
            whole = Layout(rows, r, columns, rows * r)
            size, width = whole.shape if engine == "fsdp2" else (whole.numel, 1)
            layouts.append(whole._replace(chunk=-(-size // ranks) * width))
    return layouts


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_llama_7b_on_64_ranks(engine: str) -> None:
    """Tall: one all-reduce of all Grams, less than 1 MB. Flat: all-to-alls of several times that."""
    tall = Traffic(RefLoRAConfig(), _llama_7b(engine, True, 64), 64, torch.device("cuda"))
    assert tall.collectives == {"all_reduce": 1}
    assert tall.reduced == 224 * 16 * 17 * 8
    assert {tall.sent(rank) for rank in range(64)} == {2 * 63 * tall.reduced // 64}
    assert max(map(tall.sent, range(64))) <= 1_000_000
    assert max(map(tall.buffers, range(64))) == 0
    half = Traffic(RefLoRAConfig(), _llama_7b(engine, True, 64), 64, torch.device("cuda"), half=True)
    assert half.collectives == {"all_reduce": 2} and half.sent(0) == tall.sent(0) + 2 * 63 * 4 * 224 // 64
    flat = Traffic(RefLoRAConfig(), _llama_7b(engine, False, 64), 64, torch.device("cuda"))
    assert flat.collectives == {"all_reduce": 1, "all_to_all": 2}
    assert max(map(flat.sent, range(64))) > 4_000_000
    elements = sum(layout.numel for layout in _llama_7b(engine, False, 64)[::2])
    there, back = (sum(flat.exchanged(rank)[way] for rank in range(64)) for way in (0, 1))
    assert there == 2 * back and 0.98 * 4 * elements < back < 4 * elements
    assert sum(map(flat.buffers, range(64))) == 4 * 2 * 3 * elements
