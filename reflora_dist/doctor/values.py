"""Type checks of the values in configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .findings import Findings


def check_sections(config: dict[Any, Any], sections: Sequence[tuple[str, ...]]) -> None:
    """Refuse keys that are not strings, and sections that are not mappings.

    Args:
        config: a file's contents.
        sections: paths of the sections; each may be absent.

    Raises:
        ValueError: the message names the key or section.
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
    """Return a key's value as an integer of at least 1; None if it is absent or wrong.

    A wrong value adds an error to the findings.
    """
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
    """Return the first line of an error, with its type."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_number(value: object) -> bool:
    """Return whether a value is an int or float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def truth(value: object) -> bool:
    """Return whether a switch of accelerate is on, given as a boolean or a word."""
    return str(value).lower() in ("true", "1", "yes")
