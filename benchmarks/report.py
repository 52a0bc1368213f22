"""Write the tables and plots of all results, and the README's, from the JSON records alone.

    python benchmarks/report.py           writes results/*/*.md, *.png and the marked parts of the READMEs
    python benchmarks/report.py --check   writes nothing, and fails if something is not what the records give

In a README a report stands between ``<!-- report: BENCHMARK/RECORD -->`` and ``<!-- end of report -->``, and one line
of what it comes to between ``<!-- headline: BENCHMARK/RECORD -->`` and ``<!-- end of headline -->``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks.harness.options import parse

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
READMES = (REPOSITORY / "README.md", REPOSITORY / "benchmarks" / "README.md")
_MARKED = re.compile(r"(<!-- (report|headline): ([\w./-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
_SOURCE = "Source"  # the PNG text entry that holds the digest of the record a plot was made from


@dataclasses.dataclass
class Arguments:
    """What to do with the reports."""

    check: bool = dataclasses.field(default=False, metadata={"help": "write nothing; fail if something is out of date"})


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
    """Every committed record, in order."""
    return sorted(RESULTS.glob("*/*.json"))


def markdown(path: Path) -> str:
    """A record's report.

    Raises:
        ValueError: no report is written for its benchmark.
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
    """A README's text with every marked report and headline made anew.

    Raises:
        ValueError: it names a record that does not exist.
    """

    def text(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        path = RESULTS / f"{name}.json"
        if not path.exists():
            raise ValueError(f"{readme.name} names the record {name}, and {path} does not exist")
        if kind == "headline":
            record = json.loads(path.read_text())
            return f"{start}{_module(record).headline(record)}\n{end}"
        content = markdown(path)
        if path.with_suffix(".png").exists():
            image = path.with_suffix(".png").relative_to(REPOSITORY)
            place = image if readme.parent == REPOSITORY else image.relative_to(readme.parent.relative_to(REPOSITORY))
            content += f"\n![{name}]({place})\n"
        return f"{start}{content}{end}"

    return _MARKED.sub(text, readme.read_text())


def outdated() -> Iterator[str]:
    """The files that differ from what the records give."""
    for path in records():
        tables, plot = path.with_suffix(".md"), path.with_suffix(".png")
        if not tables.exists() or tables.read_text() != markdown(path):
            yield str(tables.relative_to(REPOSITORY))
        # pixels depend on matplotlib's version and fonts; what a plot was made from does not
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
