"""Fields of option dataclasses: a default and the help text of the command line."""

from __future__ import annotations

from dataclasses import field


def option(default: object, help_text: str, **metadata: object):  # type: ignore[no-untyped-def]
    """Return a dataclass field for ``HfArgumentParser``. A list as default is copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help_text, **metadata})
    return field(default=default, metadata={"help": help_text, **metadata})
