"""Read a command line. A mistake is told in one line, with the options that an unknown one resembles."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake in one line, and not with the list of all options."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(unknown(rest[0], self))
        return options

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse_into_dataclasses(parser: Any, argv: Sequence[str] | None) -> list[Any]:
    """Return the command line as the dataclasses of transformers' HfArgumentParser, and the rest as a namespace.

    Raises:
        ValueError: an option is unknown or has a value that it cannot have. The message is one line.
    """

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse  # argparse would print all options, and end the program
    _, rest = parser.parse_known_args(argv)  # an unknown option explains what a dataclass would then miss
    if rest:
        raise ValueError(unknown(rest[0], parser))
    return list(parser.parse_args_into_dataclasses(args=argv))


def unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    """Return what to say of an argument that the parser does not know."""
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no option; --help lists the options"
    name = argument.partition("=")[0]
    known: dict[str, str] = {}  # each option once, though HfArgumentParser knows most with "-" and with "_"
    for action in parser._actions:
        for option in action.option_strings:
            known.setdefault(option.lstrip("-").replace("-", "_"), option)
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=3)
    said = f"did you mean {' or '.join(known[option] for option in near)}?" if near else "--help lists the options"
    return f"there is no option {name}; {said}"
