"""Loading of base models, their configurations and tokenizers, with checks before and errors that name the files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from .local_names import hint_of, require_path_or_hub_name
from .open_files import cause_of, open_tensors, read_json, readable
from .safe_pickles import require_weights
from .stored_weights import INDEX_NAME, weight_files

_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def read_model_config(name: str, **settings: Any) -> Any:
    """Return the configuration of a model.

    Args:
        name: folder, or name on the hub.
        settings: further arguments of ``AutoConfig.from_pretrained``.

    Raises:
        ValueError: the configuration cannot be found or read, or describes no model.
    """
    path = Path(name) / _CONFIG
    if not path.is_file():
        if path.with_name(_ADAPTER_CONFIG).is_file():
            raise ValueError(f"{name} holds an adapter and no model: name its base, or merge it (launchers/export.py)")
        require_path_or_hub_name("model", name)
        try:
            return AutoConfig.from_pretrained(name, **settings)
        except Exception as error:
            sentence = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"model {name!r} cannot be loaded: {sentence}{hint_of(name)}") from error
    read_json(path)
    with readable(path, "correct it, or get the model anew"):
        config = AutoConfig.from_pretrained(name, **settings)
        for field, value in _sizes(config).items():
            if value < 1:
                raise ValueError(f"{field} is {value}")
    return config


def load_base(kind: Any, name: str, config: Any = None, **settings: Any) -> tuple[Any, list[str]]:
    """Load a model, and return it with the names of weights that its files lack; these have random values.

    Args:
        kind: an auto class of transformers.
        name: folder, or name on the hub.
        config: the configuration; by default the model's own.
        settings: further arguments of ``from_pretrained``.

    Raises:
        ValueError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    config = read_model_config(name) if config is None else config
    _require_model_files(Path(name), config)
    try:
        # mismatched shapes are ignored here and reported below: transformers' own error would not name the weight
        model, info = kind.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error
    except Exception as error:
        for path in sorted(Path(name).glob("pytorch_model*.bin")):
            require_weights(path)
        raise ValueError(
            f"model {name!r} cannot be loaded ({cause_of(error)}): its {_CONFIG}, weights or {INDEX_NAME} are damaged, "
            f"or of a kind that transformers {importlib.metadata.version('transformers')} does not know"
        ) from error
    if info["mismatched_keys"]:
        key, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"model {name!r} cannot be loaded: {key} is stored as {tuple(stored)}, and {_CONFIG} says "
            f"{tuple(wanted)}: correct {_CONFIG}, or get the model anew"
        )
    return model, sorted(info["missing_keys"])


def require_no_missing(name: str, missing: list[str]) -> None:
    """Refuse a model that lacks weights, since random ones would take their place.

    Args:
        name: name of the model, for the message.
        missing: names of the missing weights.

    Raises:
        ValueError: a weight is missing; the message names the first.
    """
    if missing:
        raise ValueError(
            f"model {name!r} lacks {len(missing)} of its weights ({missing[0]}, ...), and random ones would take their "
            f"place: get it anew, or correct {_CONFIG}"
        )


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a folder, or of a name on the hub.

    Raises:
        ValueError: the tokenizer cannot be found or read.
    """
    folder = Path(name)
    require_path_or_hub_name("the tokenizer of", name)
    if (folder / _CONFIG).is_file():  # AutoTokenizer reads the tokenizer's class from it
        read_model_config(name)
    present = [file for file in _TOKENIZER_FILES if (folder / file).is_file()]
    for file in present:
        if file.endswith(".json"):
            read_json(folder / file)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ImportError) as error:
        raise ValueError(f"the tokenizer of {name!r} cannot be loaded: {error}") from error
    except Exception as error:
        files = f" from {', '.join(present)}" if present else ""
        raise ValueError(
            f"the tokenizer of {name!r} cannot be loaded{files} ({cause_of(error)}): get these files anew, or name "
            "another tokenizer"
        ) from error


def require_size(folder: Path, config: Any, shapes: Sequence[Sequence[int]]) -> None:
    """Refuse a configuration with sizes far above those of the weights, before a model of these sizes is built.

    Args:
        folder: the model's folder.
        config: the model's configuration.
        shapes: shapes of all weights in the model's files.

    Raises:
        ValueError: a size is above both the number of tensors and every dimension of a tensor.
    """
    largest = max([len(shapes), *(size for shape in shapes for size in shape)])
    for field, value in _sizes(config).items():
        if value > largest:
            raise ValueError(
                f"{folder / _CONFIG} says {field}={value}, but the weights belong to a smaller model: correct it, or "
                "get the model anew"
            )


def _require_model_files(folder: Path, config: Any) -> None:
    """Refuse a local folder with invalid JSON, without weights, or with safetensors that are cut off or do not fit."""
    if not folder.is_dir():
        return
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    if any(folder.glob("pytorch_model*.bin*")) and not any(folder.glob("*.safetensors*")):
        return
    try:
        paths = weight_files(folder)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    shapes: list[Sequence[int]] = []
    for path in paths:
        with open_tensors(path) as file:
            shapes += [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118  (it is no mapping)
    require_size(folder, config, shapes)


def _sizes(config: Any) -> dict[str, int]:
    values = {field: getattr(config, field, None) for field in _SIZES}
    return {field: value for field, value in values.items() if isinstance(value, int)}
