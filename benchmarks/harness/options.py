"""Options of the benchmarks: read from the command line, and the checks that most of them share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from typing import Any, TypeVar

from transformers import HfArgumentParser

_Options = TypeVar("_Options")


def parse(kind: type[_Options]) -> _Options:
    """The command line as a dataclass; what it refuses is told in one line, with exit code 2 as argparse has."""
    parser = HfArgumentParser(kind)  # type: ignore[arg-type]
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    try:
        options, *_ = parser.parse_args_into_dataclasses()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None  # a traceback would hide the line
    return options


def require_known(options: Any, **choices: Collection[str]) -> None:
    """Raise ValueError for an option that is not one of its choices; None stands for one that was not given."""
    for name, known in choices.items():
        value = getattr(options, name)
        if value is not None and value not in known:
            raise ValueError(f"--{name} {value} is unknown; choose one of {', '.join(known)}")


def require_positive(options: Any, *names: str) -> None:
    """Raise ValueError for a number that is not above 0; None stands for one that was not given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:  # nan is not, either
            raise ValueError(f"--{name} {value} must be positive")
