"""Output of a diagnosis as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .diagnosis import Diagnosis
from .findings import LEVELS
from .setup import Setup

_GIB, _MIB = 2**30, 2**20


def text(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as text, with the findings at the end."""
    lines = [*_versions(diagnosis)]
    if diagnosis.setup is not None:
        lines += _engine(diagnosis, diagnosis.setup)
    if diagnosis.memory is not None:
        lines += [*_memory(diagnosis), *_wire(diagnosis)]
    if diagnosis.measured:
        lines += _measured(diagnosis.measured)
    return "\n".join([*lines, *_findings(diagnosis)])


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Yield the rows with aligned columns; those in ``right`` are right-aligned."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _versions(diagnosis: Diagnosis) -> Iterator[str]:
    yield "Versions"
    rows = [["", "installed", "required", "tested"]]
    rows += [[row.package, row.installed or "-", row.required or "-", row.tested] for row in diagnosis.versions]
    yield from columns(rows)


def _engine(diagnosis: Diagnosis, setup: Setup) -> Iterator[str]:
    yield ""
    copies = f", {setup.replicas} copies of {setup.shard_size} ranks" if 1 < setup.shard_size < setup.world_size else ""
    yield f"Engine: {setup.engine} on {setup.world_size} ranks, {setup.num_nodes} machine(s){copies}"
    yield (
        f"  {setup.precision} precision, {setup.micro_batch_size} x {diagnosis.options.sequence_length} tokens per "
        f"micro batch, {setup.accumulation} per step, activation checkpointing "
        f"{'on' if setup.activation_checkpointing else 'off'}"
    )
    if diagnosis.pairs is None or diagnosis.parameters is None:
        return
    count = sum(row["pairs"] for row in diagnosis.pairs)
    yield (
        f"  {diagnosis.parameters['base']:,} parameters, {count} pairs of {diagnosis.parameters['factors']:,}; "
        f"layout {diagnosis.layout}"
    )
    rows = [["pairs", "r", "in", "out", "lora_A", "lora_B"]]
    rows += [[f"{value:,}" if isinstance(value, int) else value for value in row.values()] for row in diagnosis.pairs]
    yield from columns(rows, right=(0, 1, 2, 3))


def _memory(diagnosis: Diagnosis) -> Iterator[str]:
    yield ""
    yield "Memory of the rank that holds most, GiB"
    rows = [["", "device", "host", ""]]
    for item in diagnosis.memory or ():
        size = f"{item.bytes / _GIB:,.3f}"
        cells = [size, ""] if item.place == "device" else ["", size]
        rows.append([item.name, *cells, "" if item.counted else "estimate"])
    total, host = diagnosis.bytes_in("device") / _GIB, diagnosis.bytes_in("host") / _GIB
    rows.append(["together", f"{total:,.3f}", f"{host:,.3f}" if host else "", _share(total, diagnosis)])
    yield from columns(rows, right=(1, 2))
    yield "  CUDA's context, NCCL's buffers and fragmentation are not in it"


def _share(total: float, diagnosis: Diagnosis) -> str:
    available = diagnosis.options.gpu_memory_gib
    return f"{total / available:.0%} of {available:g} GiB" if available else ""


def _wire(diagnosis: Diagnosis) -> Iterator[str]:
    assert diagnosis.traffic is not None
    gbit = diagnosis.options.bandwidth_gbit
    yield ""
    yield "Sent by a rank in an optimizer step, MiB" + (f" (and ms at {gbit:g} Gbit/s)" if gbit else "")
    method, sends = diagnosis.options.method, diagnosis.method_sends or ()
    rows = []
    for sent in sends:
        calls = f"{diagnosis.traffic.collectives[sent.collective]} {sent.collective}"
        rows.append([f"{method}: {sent.what} ({calls})", *_size(sent.bytes, gbit)])
    if len(sends) != 1:
        rows.append([f"{method}: together" if sends else f"{method}: nothing", *_size(diagnosis.sent_bytes, gbit)])
    for sent in diagnosis.engine_sends or ():
        rows.append([f"the engine: {sent.what} ({sent.collective}), estimate", *_size(sent.bytes, gbit)])
    yield from columns(rows, right=(1, 2))


def _size(sent_bytes: int, gbit: float | None) -> list[str]:
    return [f"{sent_bytes / _MIB:,.2f}", f"{sent_bytes * 8 / gbit / 1e6:,.2f}" if gbit else ""]


def _measured(measured: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    yield "Measured between the ranks (median, slowest rank)"
    rows = [["", "MiB sent", "ms", "Gbit/s"]]
    for row in measured:
        rows.append(
            [
                row["collective"],
                f"{row['sent_bytes'] / _MIB:,.2f}",
                f"{row['milliseconds']:,.2f}",
                f"{row['gbit_per_second']:,.2f}",
            ]
        )
    yield from columns(rows, right=(1, 2, 3))


def _findings(diagnosis: Diagnosis) -> Iterator[str]:
    yield ""
    for level in LEVELS:
        for finding in diagnosis.findings:
            if finding.level == level:
                yield f"{level}: {finding.where}: {finding.message}"
                if finding.remedy:
                    yield f"    -> {finding.remedy}"
    if diagnosis.findings.failed:
        yield "The run could not work."
    elif diagnosis.options.model is None:
        yield "Nothing in the files stands in the way of the run; without --model no more was looked at."
    else:
        yield "Nothing stands in the way of the run."
