"""The libraries' lines that say nothing to a user, and how their other lines are shown.

Each entry of ``FOREIGN`` holds for the versions that were seen to print it. A later version is heard again, so that
somebody looks whether the entry is still needed.
"""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .lines import is_first_with, show


class Foreign(NamedTuple):
    """A line of a library.

    Attributes:
        distribution: the package that prints it.
        versions: the versions that do.
        message: its beginning, as a regular expression.
    """

    distribution: str
    versions: str
    message: str

    def holds(self) -> bool:
        """Return whether the installed version prints the line."""
        try:
            from packaging.specifiers import SpecifierSet

            return importlib.metadata.version(self.distribution).split("+")[0] in SpecifierSet(self.versions)
        except (ImportError, importlib.metadata.PackageNotFoundError):  # help is answered where nothing is installed
            return False


FOREIGN = (
    # an optional package that makes 4-bit bases faster on some CPUs
    Foreign("bitsandbytes", ">=0.49,<0.51", r"Failed to load CPU gemm_4bit_forward from kernels-community"),
    # right on a machine without GPUs
    Foreign("deepspeed", ">=0.19,<0.20", r"Setting accelerator to CPU\. If you have GPU"),
    # on every rank; while it compiles, our own line says so
    Foreign("deepspeed", ">=0.19,<0.20", r"DeepSpeed deepspeed\.ops\.comm\.\w+ built successfully"),
    # DeepSpeed and accelerate call the collectives by older names
    Foreign("torch", ">=2.13,<2.14", r"`torch\.distributed\.\w+_tensor` is deprecated"),
    # PEFT asks by the older name
    Foreign("transformers", ">=5.23,<5.24", r"`is_gradient_checkpointing` is deprecated"),
    # one process reads and writes sharded checkpoints
    Foreign("torch", ">=2.11,<2.14", r"torch\.distributed is disabled, unavailable or uninitialized"),
    # the ranks' own line says what ended them
    Foreign("torch", ">=2.11,<2.14", r"Received \d+ death signal, shutting down workers"),
    Foreign("torch", ">=2.11,<2.14", r"Sending process \d+ closing signal"),
    Foreign("deepspeed", ">=0.19,<0.20", r"\[.*\] exits with return code = -?\d+"),
    Foreign("torch", ">=2.11,<2.14", r"no error file defined for parent"),
    Foreign("torch", ">=2.11,<2.14", r"failed \(exitcode: -?\d+\) local_rank: \d+"),
)


def filter_foreign() -> None:
    """Leave the lines of ``FOREIGN`` out in this process, and show other warnings once for all ranks of a machine.

    Progress bars of downloads, of loading and of data sets are for a terminal, and of the first rank.
    """
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        for library in ("HF_HUB", "HF_DATASETS"):  # transformers reads the first
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    held = "|".join(line.message for line in FOREIGN if line.holds())
    unwanted = re.compile(held).match if held else lambda text: None

    def wanted(text: str) -> bool:
        return not unwanted(text) and is_first_with(text)

    warnings.showwarning = functools.partial(_show_python_warning, wanted)
    builtins.print = _without(unwanted, print)
    logging.Logger.handle = _wanted_only(wanted, logging.Logger.handle)  # type: ignore[method-assign]
    if not logging.root.handlers:
        logging.root.addHandler(_Shown(logging.WARNING))


def _show_python_warning(
    wanted: Callable[[str], bool], message: Any, category: Any, filename: str, *further: Any
) -> None:
    text = " ".join(str(message).split())
    if wanted(text):
        _show_warning(_library(filename), text)


def _without(unwanted: Callable[[str], Any], printed: Callable[..., None]) -> Callable[..., None]:
    """Return a ``print`` that leaves out what is unwanted."""

    def print_wanted(*values: Any, **options: Any) -> None:
        if not (values and unwanted(str(values[0]))):
            printed(*values, **options)

    return print_wanted


class _Shown(logging.Handler):
    """A handler for our loggers, and for libraries that have none of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger is not logging.root:
            if any(_shows(handler, record) for handler in logger.handlers):  # it passes the record on all the same
                return
            logger = logger.parent
        _show_warning(_library(record.pathname), record.getMessage())


def _shows(handler: logging.Handler, record: logging.LogRecord) -> bool:
    return record.levelno >= handler.level and not isinstance(handler, logging.NullHandler)


def _show_warning(source: str, text: str) -> None:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    show(f"{Path(sys.argv[0]).name}: {rank}warning: {source}{text}", "warning")


def _library(filename: str) -> str:
    """Return "NAME: " for the library that a file belongs to, or an empty text for a file of ours."""
    parts = Path(filename).parts
    after = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else ()
    return f"{after[0].removesuffix('.py')}: " if after and after[0] != "reflora_dist" else ""


def _wanted_only(wanted: Callable[[str], bool], handle: Callable[..., None]) -> Callable[..., None]:
    """Return a ``logging.Logger.handle`` that passes on what is wanted.

    Filters would have to be put on handlers, which the libraries make later and in their own ways.
    """

    def handle_wanted(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or wanted(" ".join(record.getMessage().split())):
            handle(logger, record)

    return handle_wanted
