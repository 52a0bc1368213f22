"""All methods by name, found in the modules of this folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from .base import Method


def _found() -> dict[str, type[Method]]:
    package = __name__.rpartition(".")[0]
    methods: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name in ("config", "reference", "registry"):
            continue  # these define no method, and config imports this module
        for _, value in inspect.getmembers(importlib.import_module(f"{package}.{module.name}"), inspect.isclass):
            if issubclass(value, Method) and "name" in vars(value):
                methods[value.name] = value
    return methods


METHODS: dict[str, type[Method]] = dict(sorted(_found().items(), key=lambda item: (item[0] != "lora", item[0])))
"""Plain LoRA first, which comparisons start with, then the others in alphabetical order."""
