"""Comparing finished runs: the table's figures, the plot, and runs that must not be compared."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import compare
from launchers.training.recorder import METRICS_FILE

RUN: dict[str, Any] = {
    "method": "lora",
    "held_out_loss": [{"step": 0, "loss": 5.0}, {"step": 4, "loss": 4.25}],
    "train_loss": [{"step": 2, "loss": 4.75}, {"step": 4, "loss": 4.5}],
    "steps": 4,
    "world_size": 2,
    "step_seconds_median": 0.125,
    "bytes_per_step": 0,
    "peak_memory_bytes": 2**29,
    "peak_memory_kind": "resident set",
    "report": {"engine": "zero3"},
    "settings": {"method": "lora", "seed": 0, "lora_r": 8, "reflora_warmup_steps": 1},
}


def _other(**settings: Any) -> dict[str, Any]:
    run = copy.deepcopy(RUN)
    run["method"] = run["settings"]["method"] = "reflora"
    run["settings"] |= settings
    run["held_out_loss"][1]["loss"] = 4.125
    run["bytes_per_step"] = 1_234_567
    return run


def _write(folder: Path, *runs: dict[str, Any]) -> list[str]:
    for number, run in enumerate(runs):
        (folder / str(number)).mkdir()
        (folder / str(number) / METRICS_FILE).write_text(json.dumps(run))
    return [str(folder / str(number)) for number in range(len(runs))]


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    compare.main()


def test_the_table_and_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plots" / "comparison.png"
    _main(monkeypatch, *_write(tmp_path, RUN, _other()), "--plot", str(plot))
    printed = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in printed.splitlines() if "│" in line}
    cells = {name: tuple(cell.strip() for cell in row) for name, row in rows.items()}
    assert cells["held-out loss, step 0"] == ("5.0000", "5.0000")
    assert cells["held-out loss, step 4"] == ("4.2500", "4.1250")
    assert cells["time per step, median (ms)"] == ("125", "125")
    assert cells["bytes per step and rank"] == ("0", "1,234,567")
    assert cells["peak memory, resident set (GiB)"] == ("0.50", "0.50")
    assert plot.read_bytes().startswith(b"\x89PNG")


def _started_elsewhere() -> dict[str, Any]:
    run = _other()
    run["held_out_loss"][0]["loss"] = 5.1
    return run


def _evaluated_elsewhere() -> dict[str, Any]:
    run = _other()
    run["held_out_loss"][1]["step"] = 3
    return run


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_other(seed=1), "seed is 0 in one, 1 in another"),
        (_other(lora_r=16), "lora_r is 8 in one, 16 in another"),
        (_started_elsewhere(), "they start from held-out losses"),
        (_evaluated_elsewhere(), "evaluated at steps"),
    ],
    ids=["seed", "rank", "start", "steps"],
)
def test_runs_that_differ_in_more_than_the_method_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        _main(monkeypatch, *_write(tmp_path, RUN, other))


def test_the_methods_own_settings_may_differ() -> None:
    compare.check_comparable([RUN, _other(reflora_warmup_steps=100)])


def test_runs_whose_settings_changed_on_the_way_are_refused() -> None:
    changed = {**_other(), "settings_changed": [{"step": 2, "learning_rate": [1e-3, 1e-4]}]}
    with pytest.raises(ValueError, match=r"settings changed on the way: \[\] and \[{'step': 2, 'learning_rate'"):
        compare.check_comparable([RUN, changed])
    compare.check_comparable([changed, {**copy.deepcopy(changed), "method": "lora"}])


def test_what_was_not_measured_is_none_and_no_empty_plot_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "comparison.png"
    plot.write_text("of an earlier run")
    unlogged = {"held_out_loss": [], "train_loss": [], "step_seconds_median": None, "bytes_per_step": None}
    _main(monkeypatch, *_write(tmp_path, RUN | unlogged, _other() | unlogged), "--plot", str(plot))
    printed = capsys.readouterr().out
    assert re.search(r"time per step, median \(ms\) +│ +none │ +none │", printed)
    assert re.search(r"bytes per step and rank +│ +none │ +none │", printed)
    assert "plot: none, since no loss was logged" in printed and not plot.exists()


def test_a_folder_without_metrics_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"metrics\.json cannot be read.*finished run"):
        _main(monkeypatch, str(tmp_path))


def test_metrics_of_classification_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = {"step": 4, "set": "validation"}
    runs = [
        {**run, "held_out_metrics": [{**point, "matthews_correlation": score}]}
        for run, score in ((RUN, None), (_other(), 0.75))
    ]
    _main(monkeypatch, *_write(tmp_path, *runs), "--plot", str(tmp_path / "c.png"))
    printed = capsys.readouterr().out
    assert re.search(r"matthews_correlation, validation, step 4 +│ +none │ +0.7500 │", printed)
