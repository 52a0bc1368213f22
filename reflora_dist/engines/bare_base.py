"""Whether what is given as a base is one, and not an adapter with the base that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file


def adapter_folder(name: str) -> Path | None:
    """The folder, local or of the hub's cache, of the adapter that transformers would load for this name.

    None for a model, and for what cannot be found: whoever loads it says so.
    """
    try:
        config = find_adapter_config_file(name)
    except (OSError, ValueError):
        return None
    return None if config is None else Path(config).parent


def require_no_adapter(name: str, remedy: str) -> None:
    """Refuse an adapter where a base is wanted.

    Raises:
        ValueError: it is one; the message ends with ``remedy``.
    """
    if adapter_folder(name) is not None:
        raise ValueError(f"{name} is an adapter (it has an adapter_config.json) and no base model: {remedy}")


def require_adapter(name: str | Path) -> None:
    """Refuse a local folder without an adapter in PEFT's format where one is wanted.

    Raises:
        ValueError: it is a model's, or another.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        is_model = (folder / "config.json").is_file()
        remedy = ": it is a model by itself, give it as --model" if is_model else ": give the folder of an adapter"
        raise ValueError(f"adapter={str(name)!r} holds no {CONFIG_NAME}{remedy}")


def require_plain_peft_model(model: nn.Module) -> None:
    """Refuse a PEFT model whose adapter cannot be saved, or took the place of a trained one.

    Raises:
        TypeError, ValueError: it is one; the message says how to make it.
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
