"""Readers of JSON, safetensors and adapters in PEFT's format, whose errors name the file.

Each library raises errors of its own, and few of them name the file. This module turns each into a ValueError that
names the file, the cause and the remedy. The module ``safe_pickles`` does the same for pickles.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GET_ANEW = "it is damaged, get it anew"
# the name of a refused class or function in messages of torch.load
_REFUSED = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) ([\w.]+)")
_LONGEST = 300


def cause_of(error: BaseException) -> str:
    """Return a library's message in one line, without its advice to switch a safety check off."""
    text = str(error).strip()
    if refused := _REFUSED.search(text):
        return f"it wants {refused[1]} called, which no file of this kind needs"
    lines = text.splitlines() or [""]
    if isinstance(error, pickle.UnpicklingError) or "PytorchStreamReader" in text:
        lines = [lines[0].partition(". ")[0]]
    # a first line that ends with a colon says too little without the second
    first = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return f"{type(error).__name__}: {first:.{_LONGEST}}"


@contextmanager
def readable(path: str | Path, remedy: str = GET_ANEW) -> Iterator[None]:
    """Return a context that turns every exception inside into a ValueError that names the file.

    Args:
        path: the file that is read inside.
        remedy: the end of the message.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing about the file
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read ({cause_of(error)}): give this user the right to read it") from error
    except Exception as error:  # the type depends on the library and on the damage
        raise ValueError(f"{path} cannot be read ({cause_of(error)}): {remedy}") from error


def read_json(path: Path, remedy: str = GET_ANEW) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: the file cannot be read, or holds no JSON object.
    """
    with readable(path, remedy):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r:.40} where a JSON object is wanted: {remedy}")
    return content


@contextmanager
def open_tensors(path: Path, remedy: str = GET_ANEW) -> Iterator[Any]:
    """Return a context with a memory-mapped safetensors file.

    The file has ``keys()``, ``get_tensor(key)``, ``get_slice(key)`` and ``metadata()``.

    Raises:
        ValueError: the file cannot be read, or any error occurs inside the context.
    """
    with readable(path, remedy), safe_open(path, "pt") as file:
        yield file


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file by key, on the host.

    Raises:
        ValueError: the file cannot be read.
    """
    with readable(path):
        return load_file(path)


def read_peft_config(folder: str | Path) -> PeftConfig:
    """Return the configuration of an adapter in a folder, or of a name on the hub.

    Raises:
        ValueError: the configuration is missing or cannot be used.
    """
    path = Path(folder) / "adapter_config.json"
    if path.is_file():
        read_json(path)
    with readable(path, "name the folder of an adapter in PEFT's format, or get it anew"):
        return PeftConfig.from_pretrained(str(folder))


def read_peft_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter by PEFT's names, on the host; from a folder, or a name on the hub.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: the weights cannot be read.
    """
    paths = [Path(folder) / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    path = next((path for path in paths if path.is_file()), paths[0])
    if Path(folder).is_dir() and not path.is_file():  # PEFT would look for it on the hub
        raise FileNotFoundError(f"{path} is missing: copy it from the run, or export from another checkpoint")
    with readable(path):
        return load_peft_weights(str(folder), device="cpu")
