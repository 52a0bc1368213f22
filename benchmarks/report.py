"""Write the tables and plots of all results, and the marked parts of the READMEs, from the JSON records alone.

    python benchmarks/report.py           writes results/*/*.md, *.png and the marked parts of the READMEs
    python benchmarks/report.py --check   writes nothing, and fails if a file differs from the records

A README marks two kinds of generated text. ``<!-- table: BENCHMARK/RECORD -->`` stands before the first table of the
record's report and links to it. ``<!-- headline: BENCHMARK/RECORD -->`` stands before a sentence with its main figures.
The text ends with ``<!-- end of table -->`` or ``<!-- end of headline -->``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.options import parse
from reflora_dist.command_line.help import answer_help


@dataclasses.dataclass
class Arguments:
    """The options of report.py."""

    check: bool = dataclasses.field(default=False, metadata={"help": "write nothing; fail if something is out of date"})


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
READMES = (REPOSITORY / "README.md", REPOSITORY / "benchmarks" / "README.md")
_MARKED = re.compile(r"(<!-- (table|headline): ([\w./-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
_WIDTH = 120  # of lines in a README
_SOURCE = "Source"  # the PNG text entry that holds the digest of the record a plot was made from


def main() -> None:
    if parse(Arguments).check:
        wrong = list(outdated())
        if wrong:
            raise SystemExit("not what the records give; run python benchmarks/report.py:\n" + "\n".join(wrong))
        return
    for path in records():
        write(path)
    for readme in READMES:
        readme.write_text(filled(readme))


def records() -> list[Path]:
    """Return the paths of all records, in order."""
    return sorted(RESULTS.glob("*/*.json"))


def markdown(path: Path) -> str:
    """Return a record's report.

    Raises:
        ValueError: its benchmark has no report.
    """
    record = json.loads(path.read_text())
    return _module(record).markdown(record).rstrip() + "\n"


def write(path: Path) -> None:
    """Write a record's tables and plot beside it."""
    path.with_suffix(".md").write_text(markdown(path))
    record = json.loads(path.read_text())
    figure = _module(record).plot(record)
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight", metadata={_SOURCE: _digest(path)})


def filled(readme: Path) -> str:
    """Return a README's text with every marked table and headline made anew.

    Raises:
        ValueError: the README names a record that does not exist.
    """

    def text(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        path = RESULTS / f"{name}.json"
        if not path.exists():
            raise ValueError(f"{readme.name} names the record {name}, and {path} does not exist")
        if kind == "headline":
            record = json.loads(path.read_text())
            line = _module(record).headline(record)
            return f"{start}{textwrap.fill(line, _WIDTH, subsequent_indent='  ', break_on_hyphens=False)}\n{end}"
        links = f"[The whole report]({os.path.relpath(path.with_suffix('.md'), readme.parent)})"
        if path.with_suffix(".png").exists():
            links += f", [plot]({os.path.relpath(path.with_suffix('.png'), readme.parent)})"
        return f"{start}{_first_table(markdown(path))}\n\n{links}\n{end}"

    return _MARKED.sub(text, readme.read_text())


def _first_table(report: str) -> str:
    """Return the first table of a report, which is its main table."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), report.splitlines())
    return "\n".join(itertools.takewhile(lambda line: line.startswith("|"), lines))


def outdated() -> Iterator[str]:
    """Yield the files that differ from the records."""
    for path in records():
        tables, plot = path.with_suffix(".md"), path.with_suffix(".png")
        if not tables.exists() or tables.read_text() != markdown(path):
            yield str(tables.relative_to(REPOSITORY))
        # pixels depend on matplotlib's version and fonts, so the digest of the record is compared
        if plot.exists() and Image.open(plot).info.get(_SOURCE) != _digest(path):
            yield str(plot.relative_to(REPOSITORY))
    for readme in READMES:
        if readme.read_text() != filled(readme):
            yield str(readme.relative_to(REPOSITORY))


def _module(record: dict[str, Any]) -> Any:
    name = record["benchmark"]
    if not (REPOSITORY / "benchmarks" / "reports" / f"{name}.py").exists():
        raise ValueError(f"benchmark={name!r} has no report; add benchmarks/reports/{name}.py")
    return importlib.import_module(f"benchmarks.reports.{name}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
