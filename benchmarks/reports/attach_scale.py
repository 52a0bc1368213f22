"""Report of ``attach_scale.py``."""

from __future__ import annotations

from typing import Any

from benchmarks.reports.shared import source_line, table


def markdown(record: dict[str, Any]) -> str:
    """Return a table with one row per engine."""
    arguments, results = record["arguments"], record["results"]
    limits = results["limits"]
    header = ["engine", "lora_A", "received, MB", "seconds", "memory grown, MB", "collectives"]
    first = next(iter(results["engines"].values()))
    return "\n".join(
        [
            f"**{arguments['model']}**, r = {arguments['lora_rank']}: {first['num_pairs']} adapters; `attach` on rank "
            f"{arguments['rank']:,} of {arguments['ranks']:,}, of which only this one exists. Limits of tall adapters: "
            f"{limits['received_bytes'] / 1e6:.0f} MB received, {limits['seconds']:.0f} s, "
            f"{limits['grown_bytes'] / 1e6:.0f} MB more memory.",
            "",
            table(header, [_row(engine, figures) for engine, figures in results["engines"].items()]),
            "",
            source_line(record),
        ]
    )


def _row(engine: str, figures: dict[str, Any]) -> list[str]:
    calls = ", ".join(f"{call['kind'].strip('_')} of {call['bytes']:,} bytes" for call in figures["collectives"])
    return [
        engine.removesuffix("-flat"),
        "as PEFT stores it" if engine.endswith("-flat") else "tall",
        f"{figures['received_bytes'] / 1e6:.2f}",
        f"{figures['seconds']:.2f}",
        f"{figures['grown_bytes'] / 1e6:.1f}",
        calls,
    ]


def headline(record: dict[str, Any]) -> str:
    """Return the largest cost of attaching tall adapters, as a sentence."""
    arguments, engines = record["arguments"], record["results"]["engines"]
    tall = [figures for engine, figures in engines.items() if not engine.endswith("-flat")]
    most = {key: max(figures[key] for figures in tall) for key in ("received_bytes", "seconds", "grown_bytes")}
    return (
        f"- `attach` on one of {arguments['ranks']:,} ranks, LLaMA {arguments['model'].upper()}, r = "
        f"{arguments['lora_rank']}, ZeRO-3 or FSDP2: {most['received_bytes'] / 1e6:.1f} MB received, "
        f"{most['seconds']:.1f} s, {most['grown_bytes'] / 1e6:.0f} MB more memory."
    )


def plot(record: dict[str, Any]) -> None:
    """Return no plot: the table has four rows."""
