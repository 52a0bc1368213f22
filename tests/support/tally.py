"""How many random inputs were tried, came out right or were refused, by kind; conftest prints it at the end."""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import reflora_dist

COUNTS: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
_OWN = (Path(reflora_dist.__file__).parent, Path(__file__).parents[2] / "launchers")


class Outcome:
    """Of one input; right unless said otherwise."""

    refused = False


@contextlib.contextmanager
def tried(kind: str) -> Iterator[Outcome]:
    """Count one input of a kind, under which nothing is drawn: whatever is raised inside is a fault."""
    outcome = Outcome()
    try:
        yield outcome
    except BaseException:
        COUNTS[kind]["faults"] += 1
        raise
    COUNTS[kind]["refused" if outcome.refused else "right"] += 1


def raised_by_us(error: BaseException) -> bool:
    """Whether an exception was raised in this project's own code, and not in a library that it calls."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return any(Path(last.filename).is_relative_to(folder) for folder in _OWN)


def table() -> list[str]:
    """A Markdown table of the counts."""
    lines = ["| kind | tried | right | refused | faults |", "|---|---|---|---|---|"]
    for kind, counts in sorted(COUNTS.items()):
        numbers = [counts.total(), counts["right"], counts["refused"], counts["faults"]]
        lines.append(f"| {kind} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return lines
