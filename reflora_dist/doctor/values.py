"""Types of the values in configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .findings import Findings


def check_sections(config: dict[Any, Any], sections: Sequence[tuple[str, ...]]) -> None:
    """Make sure that keys are strings, and that sections are mappings, too.

    Args:
        config: a file's contents.
        sections: paths of those that are mappings where they are there.

    Raises:
        ValueError: names the key or section.
    """
    for path in ((), *sections):
        section: Any = config
        for name in path:
            section = section.get(name) if isinstance(section, dict) else None
        name = ".".join(path)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ValueError(f"{name}: {section!r} is not a section of keys and values")
        for key in section:
            if not isinstance(key, str):
                raise ValueError(f"{name or 'the top level'}: the key {key!r} is not a string")


def count(where: str, config: dict[str, Any], name: str, findings: Findings) -> int | None:
    """A key's value as a number of at least 1; None where it is absent, or, with an error among the findings, wrong."""
    value = config.get(name)
    if value is None:
        return None
    try:
        number = int(value) if not isinstance(value, bool | float) else 0
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        findings.error(where, f"{name}: {value!r} is no whole number above 0", "correct it, or leave it out")
        return None
    return number


def one_line(error: Exception) -> str:
    """The first line of what a library says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_number(value: object) -> bool:
    """Of any kind; switches are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def truth(value: object) -> bool:
    """Whether a switch of accelerate's is on, as a boolean or in words."""
    return str(value).lower() in ("true", "1", "yes")
