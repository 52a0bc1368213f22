"""Report of ``fsdp2_gathers.py``."""

from __future__ import annotations

from typing import Any

from benchmarks.reports.shared import source_line, table


def markdown(record: dict[str, Any]) -> str:
    """Return a table with one row per r and storage."""
    rows = [
        [
            str(row["lora_rank"]),
            "tall" if row["tall"] else "as PEFT stores it",
            f"{row['elements']:,}",
            f"{row['gathered']:,}",
            f"{row['ratio']:.2f}",
        ]
        for row in record["results"]["rows"]
    ]
    model, ranks = record["arguments"]["model"], record["world_size"]
    return "\n".join(
        [
            f"**{model}**, {ranks} ranks: what FSDP2 gathers of lora_A in a forward.",
            "",
            table(["r", "lora_A", "elements", "gathered by each rank", "times its size"], rows),
            "",
            source_line(record),
        ]
    )


def plot(record: dict[str, Any]) -> None:
    """Return no plot: the table has few numbers."""
