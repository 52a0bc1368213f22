"""Checks that tell base models and adapters apart, before a base is loaded or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from ..files.local_names import no_such_path, require_path_or_hub_name


def adapter_folder(name: str) -> Path | None:
    """Return the folder of the adapter that transformers would load for this name, local or in the hub's cache.

    Returns None for a base model, and for a name that is not found: the loader reports that.
    """
    if no_such_path(name):
        return None
    try:
        config = find_adapter_config_file(name)
    except (OSError, ValueError):
        return None
    return None if config is None else Path(config).parent


def require_no_adapter(name: str, remedy: str) -> None:
    """Refuse an adapter where a base model is wanted.

    Raises:
        ValueError: ``name`` is an adapter; the message ends with ``remedy``.
    """
    if adapter_folder(name) is not None:
        raise ValueError(f"{name} is an adapter (it has an adapter_config.json) and no base model: {remedy}")


def require_adapter(name: str | Path) -> None:
    """Refuse a local folder that holds no adapter in PEFT's format, and a path that does not exist.

    A name that the hub may have passes.

    Raises:
        ValueError: the folder holds a model, or no adapter, or does not exist.
    """
    folder = Path(name)
    require_path_or_hub_name("adapter", str(name))
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        is_model = (folder / "config.json").is_file()
        remedy = ": it is a model by itself, give it as --model" if is_model else ": give the folder of an adapter"
        raise ValueError(f"adapter={str(name)!r} holds no {CONFIG_NAME}{remedy}")


def require_plain_peft_model(model: nn.Module) -> None:
    """Refuse a PEFT model whose adapters PEFT cannot save, or whose adapter replaced a trained one.

    Raises:
        TypeError: the model is a PeftMixedModel.
        ValueError: the base was loaded from an adapter's folder, and a new adapter replaced that adapter.
    """
    for module in model.modules():
        if isinstance(module, PeftMixedModel):
            raise TypeError(
                "a PeftMixedModel's adapters cannot be saved by PEFT: make the model with peft.get_peft_model(model, "
                "config), without mixed=True"
            )
        base: Any = module.get_base_model() if isinstance(module, PeftModel) else None
        if getattr(base, "_hf_peft_config_loaded", False):
            raise ValueError(
                "the base was loaded from an adapter's folder, and get_peft_model put a fresh adapter in the place of "
                "the trained one: load the base by its own name, then PeftModel.from_pretrained(base, "
                "adapter_folder, is_trainable=True)"
            )
