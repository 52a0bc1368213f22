"""The benchmark of a shaped link: its table, one launch, and that no record is faster than its link."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import shaped_link
from benchmarks.harness import recording
from benchmarks.harness.two_hosts import ADDRESSES, BURST_BYTES, Host, refusal
from benchmarks.reports import shaped_link as report

_RECORDS = sorted((recording.RESULTS / "shaped_link").glob("*.json"))
_REFUSAL = refusal()


def _spread(median: float) -> dict[str, float]:
    return {"median": median, "q1": median - 1, "q3": median + 1, "count": 4}


def _run() -> dict[str, Any]:
    """What a run of overhead.py has, as far as it is read here."""
    figures = {"step_ms": _spread(40.0), "report": {"bytes_per_step": 250_000}}
    gather = {"step_ms": _spread(40.0), "report": None}
    flat = {"exchange": _spread(21.0), "all_reduce": _spread(5.0), "solve": _spread(3.0), "rest": _spread(4.0)}
    return {
        "lora_rank": 4,
        "num_pairs": 7,
        "adapter_parameters": 50_000,
        "largest_relative_error": {"reflora": 2e-8, "reflora-flat": 1e-8},
        "variants": {
            "lora": {"step_ms": _spread(2.0)},
            "reflora": {**figures, "report": {"bytes_per_step": 20_000}},
            "gather-coalesced": gather,
            "lora-flat": {"step_ms": _spread(3.0)},
            "reflora-flat": figures,
        },
        "breakdown_ms": {"all_reduce": _spread(5.0), "solve": _spread(3.0), "rest": _spread(4.0)},
        "other_breakdowns_ms": {
            "gather-coalesced": {"gather": _spread(33.0), "rest": _spread(6.0)},
            "reflora-flat": flat,
        },
    }


def test_the_table_and_the_plot_hold_the_cells_figures() -> None:
    cells = [shaped_link.cell(mbit, _run(), *way) for mbit in (0, 100) for way in shaped_link.WAYS]
    results = {"lora_rank": 4, "num_pairs": 7, "adapter_parameters": 50_000, "cells": cells}
    record = {
        "arguments": {"model": "tiny"},
        "results": results,
        **{"command": "c", "world_size": 2, "commit": "x", "date": "d", "hardware": "h", "versions": {}},
    }
    text = report.markdown(record)
    # 2 x 4 x 50,000 bytes, half of them on each of two ranks: 16 ms at 100 Mbit/s
    assert "| 100 Mbit/s | whole factors | 40.0 (39.0 to 41.0) | 2.0 | 33.0 | 0.0 | 6.0 | 200,000 | 16.0 |" in text
    assert "| unshaped | flat lora_A, Grams | 40.0 (39.0 to 41.0) | 3.0 | 21.0 | 5.0 | 7.0 | 250,000 |  |" in text
    assert "| 100 Mbit/s | Grams alone | 40.0 (39.0 to 41.0) | 2.0 | 0.0 | 5.0 | 7.0 | 20,000 | 1.6 |" in text
    assert "largest relative error 2e-08" in text
    figure = report.plot(record)
    figure.savefig(buffer := io.BytesIO(), format="png")
    assert len(figure.axes) == 2 and buffer.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "9b"}, "--model 9b is unknown"),
        ({"mbits": []}, r"--mbits \[\] must be one or more"),
        ({"mbits": [-1]}, r"--mbits \[-1\]"),
        ({"blocks": 0}, "--blocks 0 must be positive"),
    ],
)
def test_mistakes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shaped_link.Arguments(**values)


def test_a_host_that_fails_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped_link, "run_on", lambda *_, **__: [(0, "fine"), (3, "no memory left")])
    pair = tuple(Host(f"node{rank}", address, 0) for rank, address in enumerate(ADDRESSES))
    with pytest.raises(RuntimeError, match="node1 ended with 3:\nno memory left"):
        shaped_link.launch(shaped_link.Arguments(), pair)


def _check_physics(cells: list[dict[str, Any]]) -> None:
    """Nothing arrives before the link has let it through, and each way sends less than the one before."""
    for cell in cells:
        if cell["link_ms"] is not None:
            # each of a step's two collectives at most may find the bucket full, which crosses at once
            at_once_ms = 2 * 1e3 * 8 * BURST_BYTES / (cell["mbit"] * 1e6)
            assert cell["step_ms"]["median"] > 0.95 * cell["link_ms"] - at_once_ms, cell
    for mbit in {cell["mbit"] for cell in cells}:
        whole, tiled, grams = (cell["bytes_per_step"] for cell in cells if cell["mbit"] == mbit)
        assert whole > 2 * tiled > 4 * grams > 0


@pytest.mark.parametrize("path", _RECORDS, ids=lambda path: path.stem)
def test_no_record_is_faster_than_its_link(path: Path) -> None:
    _check_physics(json.loads(path.read_text())["results"]["cells"])


@pytest.mark.all_ranks
@pytest.mark.skipif(bool(_REFUSAL), reason=_REFUSAL)
def test_a_launch_measures_every_way() -> None:
    """multinode.sh starts the benchmark on both hosts; on 10 Mbit/s what is sent decides."""
    results = shaped_link.measure(shaped_link.Arguments(num_layers=1, mbits=[10], blocks=1, steps=2))
    assert [cell["way"] for cell in results["cells"]] == [way for *_, way in shaped_link.WAYS]
    errors = {cell["way"]: cell["largest_relative_error"] for cell in results["cells"]}
    assert errors.pop("whole factors") is None  # which the others are compared with
    assert all(error < 1e-5 for error in errors.values())
    _check_physics(results["cells"])
    steps = [cell["step_ms"]["median"] for cell in results["cells"]]
    assert steps == sorted(steps, reverse=True)
