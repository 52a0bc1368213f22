"""Helpers of all reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def source_line(record: dict[str, Any]) -> str:
    """Return where a record's figures come from: command, commit, versions, hardware, date."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    ranks = "" if record["world_size"] == 1 else f"{record['world_size']} ranks, "
    commit = record["commit"] or "unknown"
    plain = " Plain torch code: the package's kernels do not run there." if record.get("without_kernels") else ""
    return f"`{record['command']}`, {ranks}{record['hardware']}, {record['date']}, commit {commit}; {versions}.{plain}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
