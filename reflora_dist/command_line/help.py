"""Print a program's help from its option dataclasses, in the time that Python needs to start.

transformers' HfArgumentParser reads the same dataclasses, but its import takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .name import in_own_words

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
Groups = Mapping[str, type]


def answer_help(
    doc: str | None,
    groups: Groups,
    *,
    usage: str | None = None,
    further: Callable[[], Mapping[str, Iterable[Any]]] | None = None,
) -> None:
    """Print the help and end the program if the command line asks for it. Programs call this before they import torch.

    Args:
        doc: the program's docstring.
        groups: option dataclasses by the title of their group, in the order of printing.
        usage: how the program is started. Default: its file and [options].
        further: returns the fields that ``--help-all`` prints too, by title; it may import libraries.
    """
    arguments = sys.argv[1:]
    everything = further is not None and HELP_ALL in arguments
    if not everything and not any(name in arguments for name in HELP):
        return
    if os.environ.get("RANK", "0") == "0":  # one of the ranks that a launcher started
        shown: dict[str, Iterable[Any]] = {title: dataclasses.fields(kind) for title, kind in groups.items()}
        more = "" if further is None else f"{HELP_ALL} prints the options of transformers' TrainingArguments as well."
        if everything and further is not None:
            shown, more = shown | _further(further), ""
        text = help_text(usage or f"{Path(sys.argv[0]).name} [options]", doc, shown, more)
        print(in_own_words(text), end="")
    raise SystemExit(0)


def _further(further: Callable[[], Mapping[str, Iterable[Any]]]) -> dict[str, Iterable[Any]]:
    try:
        return dict(further())
    except ImportError as error:
        raise SystemExit(f"error: {HELP_ALL} reads transformers' options, and {error}: install it first") from None


def help_text(usage: str, doc: str | None, groups: Mapping[str, Iterable[Any]], more: str = "") -> str:
    """Return the help of a program with these dataclass fields by title. ``more`` is its last line."""
    parser = argparse.ArgumentParser(
        usage=usage,
        description=doc,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for title, fields in groups.items():
        group = parser.add_argument_group(title)
        for field in fields:
            group.add_argument(f"--{field.name}", metavar=_metavar(field), help=_described(field).replace("%", "%%"))
    return parser.format_help()


def _metavar(field: Any) -> str:
    if choices := field.metadata.get("choices"):
        return "{" + ",".join(map(str, choices)) + "}"
    declared = field.type if isinstance(field.type, str) else str(field.type)
    found = re.search(r"\b(bool|int|float)\b", declared)
    kind = found[1].upper() if found else "TEXT"
    return f"{kind} ..." if re.search(r"\blist\[", declared) else kind


def _described(field: Any) -> str:
    text = str(field.metadata.get("help", ""))
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return f"{text} Required."
    if default in (None, "", False) or default == [] or re.search(r"\bdefault\b", text, re.IGNORECASE):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else getattr(default, "value", default)
    return f"{text} [{shown}]".strip()
