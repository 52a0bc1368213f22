"""The one place where files are opened that a library parses: JSON, safetensors, adapters in PEFT's format.

Each library has errors of its own, and few of them name the file. Here each becomes a ValueError that names the file,
the cause and the remedy. Pickles have a module of their own, ``safe_pickles``, with the same errors.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GET_ANEW = "it is damaged, get it anew"
_REFUSED = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) ([\w.]+)")  # in torch.load's messages
_LONGEST = 300


def cause_of(error: BaseException) -> str:
    """What a library says is wrong, in one line and without its advice to switch a safety off."""
    text = str(error).strip()
    if refused := _REFUSED.search(text):
        return f"it wants {refused[1]} called, which no file of this kind needs"
    lines = text.splitlines() or [""]
    if isinstance(error, pickle.UnpicklingError) or "PytorchStreamReader" in text:
        lines = [lines[0].partition(". ")[0]]
    # a title and what it announces
    first = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return f"{type(error).__name__}: {first:.{_LONGEST}}"


@contextmanager
def readable(path: str | Path, remedy: str = GET_ANEW) -> Iterator[None]:
    """Make whatever goes wrong inside a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # by library and by what is wrong
        raise ValueError(f"{path} cannot be read ({cause_of(error)}): {remedy}") from error


def read_json(path: Path, remedy: str = GET_ANEW) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    with readable(path, remedy):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.40} where a JSON object is wanted: {remedy}")
    return content


@contextmanager
def open_tensors(path: Path, remedy: str = GET_ANEW) -> Iterator[Any]:
    """A safetensors file, mapped: its ``keys()``, ``get_tensor(key)``, ``get_slice(key)`` and ``metadata()``.

    Raises:
        ValueError: it cannot be read.
    """
    with readable(path, remedy), safe_open(path, "pt") as file:
        yield file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the host.

    Raises:
        ValueError: it cannot be read.
    """
    with readable(path):
        return load_file(path)


def read_peft_config(folder: str | Path) -> PeftConfig:
    """The configuration of an adapter: of a folder, or of a name on the hub.

    Raises:
        ValueError: there is none, or it cannot be used.
    """
    path = Path(folder) / "adapter_config.json"
    if path.is_file():
        read_json(path)
    with readable(path, "name the folder of an adapter in PEFT's format, or get it anew"):
        return PeftConfig.from_pretrained(str(folder))


def read_peft_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter by PEFT's names, on the host: of a folder, or of a name on the hub.

    Raises:
        FileNotFoundError, ValueError: there are none, or they cannot be read.
    """
    paths = [Path(folder) / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    path = next((path for path in paths if path.is_file()), paths[0])
    if Path(folder).is_dir() and not path.is_file():  # PEFT would look for it on the hub
        raise FileNotFoundError(f"{path} is missing: copy it from the run, or export from another checkpoint")
    with readable(path):
        return load_peft_weights(str(folder), device="cpu")
