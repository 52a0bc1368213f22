"""What the doctor says of pieces, messages and bytes: those that the engines cut and ranks send."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from reflora_dist import RefLoRAConfig
from reflora_dist.collectives.tiling import Layout, tile
from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.doctor.diagnosis import Diagnosis
from reflora_dist.doctor.held import factor_layouts
from reflora_dist.doctor.setup import Setup
from reflora_dist.doctor.tables import text
from reflora_dist.step.traffic import Traffic
from tests.support.doctor import FSDP1, FSDP2, SMALL, ZERO3, found, written, zero3
from tests.support.launchers import REPOSITORY

PAIRS = [(16, 768, 256), (8, 1000, 4096), (16, 10_000, 4096)]  # r, in, out
ENGINES = ["zero2", "zero3", "fsdp2", "fsdp1"]


def _layouts(engine: str, tall: bool, ranks: int) -> list[Layout]:
    wholes = []
    for r, n_in, n_out in PAIRS:
        wholes += [Layout(n_in, r, not tall, n_in * r), Layout(n_out, r, False, n_out * r)]
    return factor_layouts(Setup(engine=engine, world_size=ranks, shard_size=ranks), wholes)


@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_pieces_are_those_that_the_engine_cuts(engine: str, tall: bool) -> None:
    """On more ranks than there are pairs, or rows of lora_A: of elements numbered through."""
    ranks = 40
    layouts = _layouts(engine, tall, ranks)
    numbered = [torch.arange(layout.numel).view(layout.shape) for layout in layouts]
    if engine == "zero2":
        buffer = torch.cat([tensor.flatten() for tensor in numbered])
        owner = torch.arange(len(layouts)).repeat_interleave(torch.tensor([layout.numel for layout in layouts]))
        size = -(-len(buffer) // (2 * ranks)) * 2  # DeepSpeed pads to two elements per rank
        expected = [
            [part[of_part == factor] for part, of_part in zip(buffer.split(size), owner.split(size), strict=True)]
            for factor in range(len(layouts))
        ]
    elif engine == "fsdp2":
        expected = [[part.flatten() for part in tensor.chunk(ranks)] for tensor in numbered]
    else:
        expected = [list(tensor.flatten().split(-(-tensor.numel() // ranks))) for tensor in numbered]
    for layout, parts in zip(layouts, expected, strict=True):
        pieces = [layout.piece(rank) for rank in range(ranks)]
        parts += (ranks - len(parts)) * [torch.empty(0, dtype=torch.int64)]
        assert [piece.numel for piece in pieces] == [len(part) for part in parts]
        assert all(piece.start == part[0] for piece, part in zip(pieces, parts, strict=True) if len(part))


@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_sends_what_its_retiler_plans(engine: str, tall: bool) -> None:
    """One all-reduce of upper triangles; and what is cut: rows to a neighbour, lora_A ``[r, in]`` to one rank."""
    ranks = 40
    layouts = _layouts(engine, tall, ranks)
    traffic = Traffic(RefLoRAConfig(method="reflora"), layouts, ranks, torch.device("cuda"))
    reduced = 8 * sum(r * (r + 1) for r, _, _ in PAIRS)
    owners = [layout.owner(factor // 2, ranks) if layout.columns else 0 for factor, layout in enumerate(layouts)]
    whole_rows = tall and engine == "fsdp2"
    exchange = {} if whole_rows else {"send_recv": 2} if tall else {"all_to_all": 2}
    assert traffic.collectives == {"all_reduce": 1, **exchange}
    everything = Counter[str]()
    for rank in range(ranks):
        tilings = [tile(layout, rank, owner) for layout, owner in zip(layouts, owners, strict=True)]
        there = sum(run.numel for tiling in tilings for run in tiling.sent if run.peer != rank)
        back = sum(run.numel for tiling in tilings for run in tiling.arriving if run.peer != rank)
        assert traffic.sent(rank) == 2 * (ranks - 1) * reduced // ranks + 4 * (2 * there + back)
        everything.update(there=there, back=back)
    assert everything["there"] == everything["back"]
    cut_rows = ranks * sum(layout.lora_rank for layout in layouts) // 2  # at each end of a piece less than half a row
    flat = [(owner, layout) for owner, layout in zip(owners, layouts, strict=True) if layout.columns]
    moved = sum(layout.numel - layout.piece(owner).numel for owner, layout in flat)
    assert moved <= everything["there"] <= moved + cut_rows
    assert (everything["there"] == 0) == whole_rows
    # ranks take turns, but under ZeRO-2 one holds more than half of two of the three
    assert len({owner for owner, _ in flat}) == (0 if tall else 2 if engine == "zero2" else len(PAIRS))


FLAT_ENGINES = [(ZERO3, "zero3"), (zero3(stage=2), "zero2"), (FSDP2, "fsdp2"), (FSDP1, "fsdp1")]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "engine"), FLAT_ENGINES, ids=[engine for _, engine in FLAT_ENGINES])
def test_what_flat_adapters_cost_is_said_before(
    config: dict[str, Any], engine: str, small_model: str, tmp_path: Path
) -> None:
    """With both figures, which are those of the two diagnoses; and not where nothing is cut, or nothing is done."""
    path = written(tmp_path, config)
    options = {"model": small_model, "world_size": 12, "mixed_precision": "bf16"}
    tall = diagnose([path], DoctorOptions(**options))
    flat = diagnose([path], DoctorOptions(**options, tall_adapters=False))
    (warning,) = [finding for finding in flat.findings if finding.where == "--tall_adapters False"]
    assert warning.level == "warning" and "reflora_dist.tall_adapters(model)" in warning.remedy
    moving = sum(layout.columns and layout.moves for layout in flat.layouts or ())
    assert (0 if engine == "zero2" else 34) < moving <= 35  # ZeRO-2 leaves many whole on a rank
    assert f"{moving} of 35 lora_A are stored as [r, in] and cut: in every step each goes to one" in warning.message
    assert f"sends {flat.sent_bytes / 1e6:.2f} MB, {tall.sent_bytes / 1e6:.2f} MB if they" in warning.message
    assert ("pads them to 1.5 times" in warning.message) == (engine == "fsdp2")  # 16 rows on 12 ranks: 2 on each of 8
    assert tall.sent_bytes < flat.sent_bytes
    assert (tall.layout, flat.layout) == ("tall", "flat")
    for quiet in (tall, diagnose([path], DoctorOptions(**options, tall_adapters=False, method="reflora-s"))):
        assert not found(quiet, "warning", "stored as [r, in]"), quiet.findings
    assert "lora_A stored [r, in], to one rank and back (2 all_to_all)" in text(flat)
    assert "all_to_all" not in text(tall) and "reflora: Gram matrices (1 all_reduce)" in text(tall)
    assert _method_bytes(tall) < _method_bytes(flat)


def test_a_flag_per_pair_of_float16_masters(small_model: str, tmp_path: Path) -> None:
    options = DoctorOptions(model=small_model, world_size=4, mixed_precision="fp16")
    sent = []
    for masters in (False, True):
        fp16 = {"enabled": True, "fp16_master_weights_and_grads": masters}
        adam = {"type": "AdamW", "params": {"lr": 1e-3}}  # DeepSpeed has 16-bit masters with its own CPU Adam only
        top = {"bf16": None, "fp16": fp16, "optimizer": adam}
        diagnosis = diagnose([written(tmp_path, zero3(top, offload_optimizer={"device": "cpu"}))], options)
        sent.append(diagnosis.sent_bytes)
    assert "reflora: Gram matrices and a flag per pair (2 all_reduce)" in text(diagnosis)
    assert sent[1] - sent[0] == 2 * 3 * 4 * 35 // 4


def _method_bytes(diagnosis: Diagnosis) -> int:
    """Of its matrices and buffers."""
    return next(item.bytes for item in diagnosis.memory or () if item.name.startswith("the method's"))


@pytest.mark.parametrize("ranks", [1, 16])
def test_flat_adapters_that_no_rank_shares_cost_nothing(ranks: int, small_model: str, tmp_path: Path) -> None:
    """On one rank; and under DDP, where the option means nothing."""
    config = [written(tmp_path, ZERO3)] if ranks == 1 else []
    diagnosis = diagnose(config, DoctorOptions(model=small_model, world_size=ranks, tall_adapters=False))
    assert not found(diagnosis, "warning", "stored as [r, in]"), diagnosis.findings
    assert diagnosis.sent_bytes == 0
    assert diagnosis.layout == ("flat" if ranks == 1 else "whole")


def test_adapters_of_embeddings_stay_flat(small_model: str, tmp_path: Path) -> None:
    """And are told of without a remedy; what is linear is stored tall."""
    options = DoctorOptions(model=small_model, world_size=4, target_modules=["embed_tokens", "q_proj"])
    diagnosis = diagnose([written(tmp_path, ZERO3)], options)
    assert diagnosis.pairs is not None and diagnosis.layouts is not None
    assert [layout.columns for layout in diagnosis.layouts] == [True, False] + 5 * [False, False]
    assert [row["lora_A"].startswith("[r, in]") for row in diagnosis.pairs] == [True, False]
    assert found(diagnosis, "note", "1 of 6 lora_A are stored as [r, in]"), diagnosis.findings
    assert found(diagnosis, "note", "have no tall form")


def test_tables_tell_rows_that_are_cut(tmp_path: Path) -> None:
    """Of 64 rows 13 per rank on five, but 205 elements under ZeRO-3: 12 rows and parts of two more."""
    LlamaConfig(**{**SMALL, "num_hidden_layers": 1}).save_pretrained(tmp_path / "model")
    options = DoctorOptions(model=str(tmp_path / "model"), world_size=5, target_modules=["o_proj"])
    path = written(tmp_path, ZERO3)
    shown = text(diagnose([path], options))
    assert "205 elements on 5 of 5 ranks, cut within rows" in shown
    assert "reflora: rows that are cut, with neighbours (2 send_recv)" in shown
    assert "13 of 64 rows on 5 of 5 ranks" in text(diagnose([written(tmp_path, FSDP2)], options))


def test_what_is_solved_in_shares(small_model: str) -> None:
    """Where the solve is dear, by the device of the run: the tables, the sum and the memory have the all-gather."""
    path = str(REPOSITORY / "ds_configs/zero3.json")
    options = DoctorOptions(model=small_model, world_size=8, num_nodes=1, lora_r=64)
    on_cpu, on_gpu = (diagnose([path], options, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_gpu.traffic and on_gpu.traffic.collectives == {"all_reduce": 1}
    assert on_cpu.traffic and on_cpu.traffic.collectives == {"all_reduce": 1, "all_gather": 1}
    share = 8 * 5 * (64 * 65 + 1)  # of 35 pairs
    assert on_cpu.sent_bytes - on_gpu.sent_bytes == 7 * share
    assert _method_bytes(on_cpu) - _method_bytes(on_gpu) == 8 * share
    assert "reflora: what each rank has solved (1 all_gather)" in text(on_cpu)


def test_several_sub_groups(small_model: str, tmp_path: Path) -> None:
    config = written(tmp_path, zero3(sub_group_size=1000))
    diagnosis = diagnose([config], DoctorOptions(model=small_model, world_size=4))
    assert found(diagnosis, "warning", "several times per step")
