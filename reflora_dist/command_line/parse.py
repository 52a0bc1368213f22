"""Read a command line. A mistake is told in one line, with the options that an unknown one resembles."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .name import in_own_words


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake in one line, and not with the list of all options."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(unknown(rest[0], self))
        return options

    def error(self, message: str) -> NoReturn:
        print(in_own_words(f"{self.prog}: error: {message}"), file=sys.stderr)
        raise SystemExit(2)


def parse_into_dataclasses(parser: Any, argv: Sequence[str] | None) -> list[Any]:
    """Return the command line as the dataclasses of transformers' HfArgumentParser, and the rest as a namespace.

    Raises:
        ValueError: an option is unknown or has a value that it cannot have. The message is one line.
    """
    parser.error = refuse  # argparse would print all options, and end the program
    _, rest = parser.parse_known_args(argv)  # an unknown option explains what a dataclass would then miss
    if rest:
        raise ValueError(unknown(rest[0], parser))
    return list(parser.parse_args_into_dataclasses(args=argv))


def refuse(message: str) -> NoReturn:
    """Raise what argparse would print below the list of all options.

    Raises:
        ValueError: always.
    """
    raise ValueError(message)


def unknown(argument: str, parser: argparse.ArgumentParser, other_names: Mapping[str, str] | None = None) -> str:
    """Return what to say of an argument that the parser does not know.

    Args:
        argument: the argument.
        parser: the parser.
        other_names: what users of other programs type, and the option that they mean, without dashes.
    """
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no option; --help lists the options"
    name = argument.partition("=")[0].lstrip("-")
    known = [option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")]
    known = [option for option in known if "-" not in option or option.replace("-", "_") not in known]
    near = [f"--{option}" for option in resembling(name, known, other_names)]
    said = f"did you mean {' or '.join(near)}?" if near else "--help lists the options"
    return f"there is no option --{name}; {said}"


def resembling(name: str, known: Sequence[str], other_names: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of options that an unknown name may stand for, the nearest first; at most three."""
    name = name.replace("-", "_")
    if meant := (other_names or {}).get(name.lower()):
        return [meant]
    if name in known:
        return [name]
    return difflib.get_close_matches(name, known, n=3) or [option for option in known if option.startswith(name)][:3]
