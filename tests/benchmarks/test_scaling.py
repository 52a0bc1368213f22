"""The scaling benchmark and its cost model: bytes against counted bytes, the fit, predictions, the report."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cost_model, scaling
from benchmarks.costs import events as cost_events
from benchmarks.costs import links
from benchmarks.costs import traffic as cost_traffic
from benchmarks.costs.events import Topology
from benchmarks.harness import models, timing
from benchmarks.harness.launches import launch_ranks
from benchmarks.ranks import scaling as scaling_ranks
from benchmarks.reports import scaling as report
from reflora_dist.collectives.tiling import tile
from tests.support.launchers import REPOSITORY

_SEVEN_B = cost_model.Adapters.of(models.SHAPES["7b"], 16)


# -- bytes


@pytest.mark.parametrize(("ranks", "flat_mb", "gather_mb"), [(8, 24.8, 203.7), (64, 4.32, 229.1), (256, 1.82, 231.9)])
def test_bytes_of_llama_7b_follow_the_closed_formula(ranks: int, flat_mb: float, gather_mb: float) -> None:
    """What a rank sends on average is what the formulas of the module's docstring say."""
    sent = {way: cost_model.sent_bytes(way, _SEVEN_B, ranks) for way in cost_model.WAYS}
    sum_a, sum_b, pairs = 18_219_008, 21_757_952, 224
    grams = 2 * (ranks - 1) / ranks * 8 * pairs * 16 * 17
    flat = 3 * 4 * (ranks - 1) / ranks**2 * sum_a + grams
    assert sent["tall"] == pytest.approx(grams)  # whole rows, whatever the linear
    assert sent["gather"] == pytest.approx(4 * (ranks - 1) / ranks * (2 * sum_a + sum_b))
    assert not sent["backward"].any()
    assert sent["flat"].mean() == pytest.approx(flat)
    assert sent["flat"].mean() / 1e6 == pytest.approx(flat_mb, abs=0.05)
    assert sent["gather"][0] / 1e6 == pytest.approx(gather_mb, abs=0.05)
    baseline = 4 * (ranks - 1) / ranks * 2 * (sum_a + sum_b)  # what ``Gather`` moves: both factors and both gradients
    assert sent["gather"] == pytest.approx((1 - 0.27) * baseline, rel=0.005)


def test_with_more_ranks_than_pairs_the_owners_send_the_most() -> None:
    """An owner returns every other rank's part of a gradient; a rank that owns none only gives its parts away."""
    ranks = 256
    grams = 2 * (ranks - 1) * 8 * 224 * 16 * 17 // ranks
    part = 18_219_008 // ranks
    expected = {8 * part + grams: ranks - 224}
    for width, pairs in ((4096, 192), (11008, 32)):
        own = 16 * width // ranks
        expected[8 * (part - own) + 255 * 4 * own + grams] = pairs
    sent, counts = np.unique(cost_model.sent_bytes("flat", _SEVEN_B, ranks), return_counts=True)
    assert dict(zip(sent.tolist(), counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("ranks", [8, 64, 512, 4096])
@pytest.mark.parametrize("layout", cost_traffic.LAYOUTS)
def test_a_tall_adapter_meets_two_neighbours_at_most(layout: str, ranks: int) -> None:
    plan = cost_traffic.moved(_SEVEN_B, ranks, layout, True, "cuda")
    assert max(len(peers) for peers in plan.peers) <= 2 and not plan.holders
    assert plan.anything == (layout == "zero3" and ranks >= 512)  # 11008 rows divide by 256 and not by 512


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("lora_rank", [1, 4, 6])
@pytest.mark.parametrize("layout", cost_traffic.LAYOUTS)
def test_what_is_moved_is_what_the_package_plans(layout: str, lora_rank: int, tall: bool) -> None:
    """Whatever the sizes; and over all ranks, what is given away is what arrives."""
    adapters = cost_model.Adapters(((37, 53), (101, 7), (5, 5), (37, 53), (48, 16)), lora_rank)
    for ranks in range(1, 12):
        layouts = adapters.layouts(layout, ranks, tall)
        plan = cost_traffic.moved(adapters, ranks, layout, tall, "cpu")
        runs: set[int] = set()
        for rank in range(ranks):
            owners = [of.owner(factor // 2, ranks) if of.columns else 0 for factor, of in enumerate(layouts)]
            tilings = [tile(of, rank, owner) for of, owner in zip(layouts, owners, strict=True)]
            sent = [run for tiling in tilings for run in tiling.sent]
            arriving = [run for tiling in tilings for run in tiling.arriving]
            assert plan.held[rank] == sum(run.numel for run in sent)
            assert plan.kept[rank] == sum(run.numel for run in sent if run.peer == rank)
            assert plan.owned[rank] == sum(run.numel for run in arriving)
            assert plan.stays[rank] == sum(math.prod(tiling.direct[1]) for tiling in tilings if tiling.direct)
            assert plan.spans[rank] == len(sent)
            others = {run.peer for run in (*sent, *arriving)} - {rank}
            assert len(others) <= plan.partners + len(plan.peers[rank])
            runs |= {run.numel for run in arriving}
            if ranks > 1:
                there, back = plan.sent()
                assert (there[rank], back[rank]) == plan.traffic.exchanged(rank)
                indices = 3 * cost_traffic.INDEX_BYTES * (plan.owned[rank] // plan.grain)
                assert plan.buffers()[rank] == plan.traffic.buffers(rank) + indices
                way = "tall" if tall else "flat"
                assert cost_model.sent_bytes(way, adapters, ranks, layout, "cpu")[rank] == plan.traffic.sent(rank)
        assert all(run % plan.grain == 0 for run in runs)
        assert plan.held.sum() == plan.owned.sum()
        assert (plan.kept <= np.minimum(plan.held, plan.owned)).all()


# -- the fit


def _planted(noise: float) -> tuple[dict[str, float], list[tuple[cost_events.Counts, float]]]:
    planted = {"collective": 3e-4, "hop_intra": 5e-5, "message_intra": 2e-5, "ring_byte_intra": 1e-9}
    planted |= {"exchange_byte_intra": 5e-10, "reduce_byte": 0.0}
    generator = np.random.default_rng(0)
    rows = []
    for ranks in (2, 3, 4, 8):
        topology = Topology(ranks, ranks)
        for size in (1e3, 1e4, 1e5, 1e6, 1e7):
            for counts in (
                cost_events.all_reduce(size, topology),
                cost_events.all_gather(size, topology),
                cost_events.all_to_all(size, topology),
                cost_events.messages(size, min(2, ranks - 1), 0),
            ):
                rows.append((counts, cost_events.seconds(counts, planted) * np.exp(noise * generator.normal())))
    return planted, rows


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.05, 0.25)])
def test_fit_recovers_planted_constants(noise: float, tolerance: float) -> None:
    planted, rows = _planted(noise)
    fitted = cost_events.fit(rows)
    for name, value in planted.items():
        # the sums of an all-reduce are planted as free: what noise they get is small beside the ring's bytes
        scale = value or planted["ring_byte_intra"]
        assert abs(fitted[name] - value) < tolerance * scale, name


def test_fit_gives_no_negative_constant() -> None:
    rows = [({"collective": 1.0, "byte": 10.0}, 1.0), ({"collective": 1.0, "byte": 1000.0}, 0.5)]
    assert min(cost_events.fit(rows).values()) >= 0


def test_fit_refuses_a_time_of_zero() -> None:
    with pytest.raises(ValueError, match="not positive"):
        cost_events.fit([({"collective": 1.0}, 0.0)])


def _launches(held_out_seconds: float) -> list[dict]:
    _, rows = _planted(0.0)
    spread = lambda value: timing.spread([value])  # noqa: E731
    fitted = [{"ranks": 2, "counts": counts, "seconds": spread(time)} for counts, time in rows]
    held_out = [{"ranks": 2, "counts": rows[0][0], "seconds": spread(held_out_seconds)}]
    return [{"fitted": fitted, "held_out": held_out}]


def test_held_out_points_do_not_enter_the_fit() -> None:
    fits = [scaling.fit_and_check(_launches(seconds), cores=2) for seconds in (1e-3, 1e3)]
    assert fits[0]["constants"] == fits[1]["constants"]
    assert fits[0]["held_out"][0]["relative_error"] != fits[1]["held_out"][0]["relative_error"]
    fitted = {*scaling_ranks.WHOLE_SIZES, *scaling_ranks.FITTED_SIZES}
    assert not fitted & set(scaling_ranks.HELD_OUT_SIZES)


def test_ranks_that_share_cores_wait_for_each_other() -> None:
    counts = {"collective": 2.0, "byte": 10.0}
    assert cost_events.on_shared_cores(counts, ranks=2, cores=2) == {**counts, "wait": 0.0}
    assert cost_events.on_shared_cores(counts, ranks=4, cores=2) == {"collective": 4.0, "byte": 20.0, "wait": 4.0}


# -- predictions


def _added(way: str, adapters: cost_model.Adapters, gpus: int, cluster: str, **options: Any) -> float:
    topology = Topology(gpus, links.CLUSTERS[cluster].gpus_per_node)
    constants = cost_model.cluster_constants(links.CLUSTERS[cluster])
    return cost_model.step_seconds(cost_model.step_counts(way, adapters, topology, **options), constants)


@pytest.mark.parametrize("cluster", list(links.CLUSTERS))
def test_predictions_grow_with_what_costs(cluster: str) -> None:
    sizes = [cost_model.Adapters.of(models.SHAPES[name], 16) for name in ("7b", "13b", "70b", "405b")]
    ranks = [cost_model.Adapters.of(models.SHAPES["7b"], r) for r in (8, 16, 64)]
    for way, layout in itertools.product(cost_model.WAYS, cost_traffic.LAYOUTS):
        if (way, layout) == ("tall", "zero3"):
            continue  # some sizes divide by 512 and have nothing to exchange
        by_model = [_added(way, adapters, 512, cluster, layout=layout) for adapters in sizes]
        by_rank = [_added(way, adapters, 512, cluster, layout=layout) for adapters in ranks]
        assert by_model == sorted(by_model), (way, layout)
        assert by_rank == sorted(by_rank), (way, layout)
    # a gather moves no less on more GPUs
    gathers = [_added("gather", _SEVEN_B, gpus, cluster) for gpus in (8, 64, 512, 4096)]
    assert gathers == sorted(gathers)
    batches = [_added("backward", _SEVEN_B, 8, cluster, micro_batches=count) for count in (1, 4)]
    assert batches[1] == pytest.approx(4 * batches[0])
    for gpus in (8, 64, 512, 4096):
        for layout in cost_traffic.LAYOUTS:
            tall, flat = (_added(way, _SEVEN_B, gpus, cluster, layout=layout) for way in ("tall", "flat"))
            assert tall < flat
            assert tall < _added("gather", _SEVEN_B, gpus, cluster)


def test_slower_links_cost_more_and_only_between_nodes() -> None:
    for way in ("gather", "flat", "tall"):
        assert _added(way, _SEVEN_B, 8, "ethernet") == _added(way, _SEVEN_B, 8, "infiniband")
        assert _added(way, _SEVEN_B, 64, "ethernet") > _added(way, _SEVEN_B, 64, "infiniband")


def test_one_gpu_sends_nothing_and_every_way_computes_the_same() -> None:
    costs = {_added(way, _SEVEN_B, 1, "infiniband") for way in cost_model.WAYS}
    assert len({round(cost, 12) for cost in costs}) == 1
    assert not any(cost_model.sent_bytes(way, _SEVEN_B, 1).any() for way in cost_model.WAYS)


def test_constants_of_clusters_have_sources() -> None:
    for cluster in links.CLUSTERS.values():
        for name, constant in cluster.constants.items():
            assert 0 < constant.seconds < 1e-3, name
            assert constant.url.startswith("https://")
            assert constant.title and constant.published and constant.derivation


# -- the check before timing


def test_a_wrong_variant_is_not_timed() -> None:
    reference = {"lora": [5.0, 4.9, 4.8], "reflora": [5.0, 4.7, 4.5]}
    scaling_ranks.check_losses("fsdp2", 2, [5.0, 4.7, 4.50001], reference)
    with pytest.raises(RuntimeError, match="fsdp2 on 2 ranks"):
        scaling_ranks.check_losses("fsdp2", 2, reference["lora"], reference)
    with pytest.raises(RuntimeError, match="fsdp2 on 2 ranks"):
        scaling_ranks.check_losses("fsdp2", 2, [5.0, 4.7, float("nan")], reference)
    with pytest.raises(RuntimeError, match="cannot be told apart"):
        scaling_ranks.check_losses("fsdp2", 2, reference["lora"], {**reference, "reflora": reference["lora"]})


# -- the script


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": ["fsdp3"]}, "fsdp3"),
        ({"shape": "9b"}, "9b"),
        ({"ranks": [3, 4]}, "each must divide"),
        ({"ranks": [0]}, "positive"),
        ({"fit_ranks": [1]}, "one rank sends nothing"),
        ({"blocks": 0}, "--blocks 0"),
        ({"models": ["9b"]}, "9b"),
        ({"gpus": []}, "--gpus"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.Arguments(**change)


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    with pytest.raises(ValueError, match="starts its ranks itself"):
        scaling.main()


def test_a_failed_launch_says_what_the_ranks_printed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, sys; sys.exit(json.load(open(sys.argv[1]))['message'])")
    with pytest.raises(RuntimeError, match=r"(?s)script\.py on 1 ranks failed \(1\):.*no memory left"):
        launch_ranks(script, 1, {"message": "no memory left"})


def _run(*arguments: str) -> str:
    script = [sys.executable, *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(script, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """A short run on 1 and 2 ranks, and what it printed."""
    output = tmp_path_factory.mktemp("scaling") / "record.json"
    measured = "--ranks 1 2 --fit_ranks 2 --engines fsdp2 fsdp2-flat --seq_len 8 --blocks 1 --steps 1 --fit_rounds 1"
    predicted = "--models 7b --gpus 8 64"
    printed = _run("benchmarks/scaling.py", *measured.split(), *predicted.split(), "--output", str(output))
    return json.loads(output.read_text()), printed


@pytest.mark.all_ranks
def test_record_holds_runs_model_and_predictions(record: tuple[dict, str]) -> None:
    results = record[0]["results"]
    assert record[0]["benchmark"] == "scaling"
    cells = {(cell["scaling"], cell["ranks"]): cell for cell in results["training"] if cell["engine"] == "fsdp2"}
    assert set(cells) == {("weak", 1), ("weak", 2), ("strong", 1), ("strong", 2)}
    assert [cells["strong", ranks]["tokens_per_step"] for ranks in (1, 2)] == [16, 16]
    assert [cells["weak", ranks]["tokens_per_step"] for ranks in (1, 2)] == [8, 16]
    assert cells["weak", 1]["report"]["bytes_per_step"] == 0
    assert cells["weak", 2]["report"]["collectives_per_step"] == {"all_reduce": 1}
    flat = [cell for cell in results["training"] if cell["engine"] == "fsdp2-flat" and cell["ranks"] == 2]
    assert all(cell["report"]["collectives_per_step"] == {"all_to_all": 2, "all_reduce": 1} for cell in flat)
    assert {point["kind"] for point in results["model"]["held_out"]} == {"step of fsdp2", "step of fsdp2-flat"}
    for point in results["model"]["held_out"]:
        assert point["sent_bytes"] == point["predicted_bytes"]
        assert point["relative_error"] > -1
    assert len(results["predictions"]["rows"]) == 2 * 2 * 6  # clusters, numbers of GPUs, ways and layouts


@pytest.mark.all_ranks
def test_report_renders_the_record(record: tuple[dict, str], tmp_path: Path) -> None:
    text = report.markdown(record[0])
    assert text in record[1]
    for words in ("Predicted, not measured", "No measured error bar", "CPU cores", "weak, fsdp2", "Held-out"):
        assert words in text
    assert report.error_summary(record[0]["results"]["model"]["held_out"]) in text
    assert f"{record[0]['results']['training'][0]['variants']['lora']['tokens_per_second']:,.0f}" in text
    report.plot(record[0]).savefig(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.all_ranks
def test_report_renders_without_a_model(record: tuple[dict, str]) -> None:
    without = {**record[0], "results": {**record[0]["results"], "model": None}}
    assert "Held-out" not in report.markdown(without)
    assert report.plot(without) is not None


def test_cost_model_predicts_alone() -> None:
    printed = _run("benchmarks/cost_model.py", "--models", "13b", "--gpus", "16")
    assert "| 13b | 16 |" in printed
    assert "Predicted, not measured" in printed
