"""The benchmark of LoRA-SB's memory: its table, its check that variants do the same, one launch."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import lora_sb_memory
from benchmarks.harness import models
from benchmarks.reports.lora_sb_memory import markdown

_TINY = models.ModelShape(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_key_value_heads=2, vocab_size=64
)


def _cell(variant: str, energy: float | None, peak_mib: int) -> dict[str, Any]:
    return {
        "variant": variant,
        "ranks": 1,
        "energy": energy,
        "peak_bytes": peak_mib * 2**20,
        "added_bytes": 2**20,
        "seconds": 1.0,
    }


def test_variants_that_start_elsewhere_are_not_compared() -> None:
    """Figures of different things are an error; those of the same thing make a table."""
    cells = [_cell("training", None, 500), _cell("by group", 1.0, 510), _cell("all at once", 1.001, 900)]
    lora_sb_memory._require_equal_energy(cells)
    with pytest.raises(RuntimeError, match=r"by group captures 0\.9"):
        lora_sb_memory._require_equal_energy([_cell("by group", 0.9, 510), _cell("all at once", 1.0, 900)])
    shape = {"num_layers": _TINY.num_layers}
    record = {
        "arguments": {"shape": "tiny", "lora_rank": 2, "batches": 1, "batch_size": 1, "seq_len": 8},
        "results": {"shape": shape, "gradient_bytes": 2**20, "cells": cells},
        **{"command": "c", "world_size": 1, "commit": "x", "date": "d", "hardware": "h", "versions": {}},
    }
    table = markdown(record)
    assert "| 1 | by group | 510 | 1 |" in table and "| 1 | all at once | 900 | 1 |" in table


def test_mistakes_are_refused() -> None:
    """Before anything is launched."""
    with pytest.raises(ValueError, match="--shape none is unknown"):
        lora_sb_memory.Arguments(shape="none")
    with pytest.raises(ValueError, match="--batches 0"):
        lora_sb_memory.Arguments(batches=0)


@pytest.mark.all_ranks
def test_a_launch_measures() -> None:
    """Two ranks, one variant: a peak, a time and an energy."""
    arguments = lora_sb_memory.Arguments(shape="small", batches=1, seq_len=8)
    cell = lora_sb_memory.launch(arguments, "by group", 2)
    assert cell["peak_bytes"] > cell["added_bytes"] > 0 and cell["seconds"] > 0 and cell["energy"] > 0
