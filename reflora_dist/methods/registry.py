"""All methods by name, found in the modules of this folder."""

from __future__ import annotations

import importlib
import inspect

from .base import Method
from .names import METHOD_NAMES


def _found() -> dict[str, type[Method]]:
    package = __name__.rpartition(".")[0]
    methods: dict[str, type[Method]] = {}
    for name in METHOD_NAMES:
        module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
        classes = [value for _, value in inspect.getmembers(module, inspect.isclass) if issubclass(value, Method)]
        own = [value for value in classes if vars(value).get("name") == name]
        assert len(own) == 1, f"{module.__name__} must define one method, with name = {name!r}"
        methods[name] = own[0]
    return methods


METHODS: dict[str, type[Method]] = _found()
