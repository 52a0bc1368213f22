"""Read the options of the benchmarks from the command line, and check them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from typing import Any, TypeVar

from reflora_dist.command_line.parse import parse_into_dataclasses

_Options = TypeVar("_Options")


def parse(kind: type[_Options]) -> _Options:
    """Return the command line as a dataclass. A refused value ends the program with one line and exit code 2."""
    from transformers import HfArgumentParser  # in a function, since --help is printed without it

    parser = HfArgumentParser(kind)  # type: ignore[arg-type]
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    try:
        options, *_ = parse_into_dataclasses(parser, None)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None  # a traceback would hide the line
    return options


def require_known(options: Any, **choices: Collection[str]) -> None:
    """Raise ValueError for an option that is not one of its choices. None means that it was not given."""
    for name, known in choices.items():
        value = getattr(options, name)
        if value is not None and value not in known:
            raise ValueError(f"--{name} {value} is unknown; choose one of {', '.join(known)}")


def require_positive(options: Any, *names: str) -> None:
    """Raise ValueError for a number that is not above 0. None means that it was not given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # refuses nan, too
            raise ValueError(f"--{name} {value} must be positive")
