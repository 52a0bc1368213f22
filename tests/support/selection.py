"""Which tests start processes: those that ``--fast`` leaves out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import pytest

# what starts a process, by module or by name
_MODULES = ("subprocess", "multiprocessing")
_FOLLOWED = ("tests", "benchmarks", "launchers")


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test, a fixture of it, or a function of ours that either of them names starts a process."""
    functions = [item.function] if isinstance(item, pytest.Function) else []
    fixtures = getattr(item, "_fixtureinfo", None)
    if fixtures is not None:
        functions += [found.func for defs in fixtures.name2fixturedefs.values() for found in defs]
    return any(_starts(function) for function in functions)


def _is_ours(module: str | None) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _FOLLOWED


@functools.cache
def _starts(function: Any) -> bool:
    seen: set[Any] = set()
    waiting = [function]
    while waiting:
        current = waiting.pop()
        if inspect.isclass(current):
            waiting += vars(current).values()
        if not inspect.isroutine(current) and not hasattr(current, "__wrapped__"):
            continue
        current = inspect.unwrap(current)
        if not inspect.isfunction(current) or current in seen:
            continue
        seen.add(current)
        for found in _named(current):
            if inspect.ismodule(found) and found.__name__ in _MODULES:
                return True
            if _is_ours(getattr(found, "__module__", None)):
                waiting.append(found)
    return False


def _named(function: Any) -> Iterator[Any]:
    """The globals that a function names, and those of modules that it names."""
    names = list(_names(function.__code__))
    for name in names:
        if name in function.__globals__:
            found = function.__globals__[name]
            yield found
            if inspect.ismodule(found) and _is_ours(found.__name__):
                yield from (getattr(found, attribute) for attribute in names if hasattr(found, attribute))


def _names(code: CodeType) -> Iterator[str]:
    """Those in a code object and in the functions that are defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
