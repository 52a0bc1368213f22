"""The base's embedding and head in an adapter's files, for a model with a resized vocabulary.

After ``resize_token_embeddings`` the saved base no longer holds these weights, so the adapter's files do.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from ..engines.pairs import WRAPPER_ATTRIBUTES, clean_name
from ..engines.whole_parameters import Owner, whole_shape

# Suffixes of an embedding's key in an adapter's file: none, or the attributes of PEFT's layers around the embedding.
_PLACES = ("", ".base_layer", ".token_adapter.base_layer", ".original_module")
_TOKENS = ".token_adapter.trainable_tokens_delta"


def embedding_names(peft_model: PeftModel, owners: Mapping[str, Owner]) -> dict[str, str]:
    """Return the names of the parameters of the base's embedding and head, by their keys in an adapter's file.

    A tied weight has several keys, and so has a module that the model contains under several paths.
    """
    wanted = {id(_base(layer)) for layer in vocabulary_layers(peft_model)}
    names: dict[int, list[tuple[str, str]]] = {}
    for name, (module, attribute) in owners.items():
        if id(module) in wanted and attribute not in module._buffers:
            names.setdefault(id(module), []).append((name, attribute))
    paths = peft_model.named_modules(remove_duplicate=False)
    return {
        clean_name(f"{path}.{attribute}"): name
        for path, module in paths
        for name, attribute in names.get(id(module), ())
    }


def kept_embeddings(peft_model: PeftModel, owners: Mapping[str, Owner], adapter: str, resized: bool) -> dict[str, str]:
    """Return the entries of :func:`embedding_names` that go into an adapter's file, each parameter once.

    As with PEFT's ``save_embedding_layers="auto"``, these are all entries if the vocabulary was resized, else those of
    layers that LoRA adapts. Layers with a trained copy (``modules_to_save``) are left out. If LoRA adapts only the
    embedding or only the head, PEFT would leave out the other one and so lose its resized rows.
    """
    layers = {
        id(_base(layer)): layer for layer in vocabulary_layers(peft_model) if _needs_its_base(layer, adapter, resized)
    }
    kept: dict[str, str] = {}
    seen: set[int] = set()
    for key, name in embedding_names(peft_model, owners).items():
        parameter = getattr(*owners[name])
        if id(owners[name][0]) in layers and id(parameter) not in seen:
            seen.add(id(parameter))
            kept[key] = name
    return kept


def vocabulary_is_resized(peft_model: PeftModel) -> bool:
    """Return whether the vocabulary's size differs from the base's. Reads this machine's files, never asks the hub.

    Warns and returns False if the base's configuration is not on this machine.
    """
    size = _vocabulary(getattr(peft_model, "config", None))
    config = next(iter(peft_model.peft_config.values()))
    name = config.base_model_name_or_path
    if size is None or not name:
        return False
    try:
        base = type(peft_model.config).from_pretrained(local_model_folder(name, config.revision))
    except (OSError, ValueError):
        warnings.warn(
            f"the configuration of the base {name!r} is not on this machine, so whether the vocabulary was resized is "
            "not known, and the embedding is left out of the adapter: if it was, save the resized base in a folder and "
            "load it from there, or give LoraConfig(modules_to_save=[...]) the embedding and the head",
            stacklevel=2,
        )
        return False
    return _vocabulary(base) not in (None, size)


def local_model_folder(name: str, revision: str | None) -> str:
    """Return a model's local folder: the folder ``name`` itself, or its snapshot in the hub's cache.

    transformers would ask the hub and wait for its answer.

    Raises:
        FileNotFoundError: the model is not on this machine.
    """
    if name and Path(name).is_dir():
        return name
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise FileNotFoundError(name)
    return str(Path(found).parent)


def is_spare(key: str, others: Collection[str] = ()) -> bool:
    """Return whether a key is a spare copy, which PEFT writes beside a trained embedding and no model needs.

    Args:
        key: a key of an adapter's file.
        others: the keys that the model needs.
    """
    if key.endswith(_TOKENS):
        return any(other.endswith(_TOKENS) for other in others)  # of the head tied to the embedding
    return key.endswith((".modules_to_save.weight", ".original_module.weight"))


def saved_embeddings(base: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the embedding and head weights in an adapter's ``tensors``, by their module's path in ``base``."""
    layers = {id(layer) for layer in vocabulary_layers(base)}
    found: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        keys = [f"base_model.model.{path}{place}.weight" for place in _PLACES] if id(module) in layers else []
        found |= {path: tensors[key] for key in keys if key in tensors}  # noqa: B035  (one of the keys at most)
    return found


def resize_for(base: Any, tensors: Mapping[str, Tensor], source: Any) -> None:
    """Resize a base's vocabulary to that of an adapter. The new rows get their values when the adapter is loaded.

    Args:
        base: the model of transformers to resize.
        tensors: the tensors of the adapter's file.
        source: name of the adapter in error messages.

    Raises:
        ValueError: ``tensors`` hold a resized embedding without the head, or the reverse.
    """
    found = saved_embeddings(base, tensors)
    rows = {weight.shape[0] for weight in found.values()}
    if len(rows) != 1 or rows == {whole_shape(base.get_input_embeddings().weight)[0]}:
        return
    brought = {id(base.get_submodule(path).weight) for path in found}
    lacking = [type(layer).__name__ for layer in vocabulary_layers(base) if id(layer.weight) not in brought]
    if lacking:
        raise ValueError(
            f"{source} was trained with a vocabulary of {rows.pop()} and holds {', '.join(found)} but not the "
            f"{'embedding' if lacking[0] == 'Embedding' else 'head'}: save it anew with save_adapter"
        )
    base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def set_vocabulary(config: Any, size: int) -> None:
    """Set the vocabulary's size in a model's configuration."""
    _text(config).vocab_size = size


def input_embedding(model: Any) -> nn.Module | None:
    """Return the layer that maps token ids to vectors, or None for a model without one.

    A model of transformers without one (speech, vision) raises NotImplementedError, which is how transformers documents
    it; a module of another library has no such method.
    """
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def vocabulary_layers(model: Any) -> list[nn.Module]:
    """Return the input embedding and the head, as far as the model has them, with PEFT's layers around them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [_unwrapped(layer) for layer in (input_embedding(model), head) if isinstance(layer, nn.Module)]


def _unwrapped(layer: nn.Module) -> nn.Module:
    while wrapped := next((layer._modules[name] for name in WRAPPER_ATTRIBUTES if name in layer._modules), None):
        layer = wrapped
    return layer


def _base(layer: nn.Module) -> nn.Module:
    """Return the base's own module inside PEFT's layers and other wrappers."""
    inner: Any = layer
    if isinstance(inner, ModulesToSaveWrapper):
        inner = inner.original_module
    elif isinstance(inner, TrainableTokensWrapper):
        inner = inner.token_adapter.base_layer
    elif isinstance(inner, BaseTunerLayer):
        inner = inner.get_base_layer()
    return layer if inner is layer else _base(_unwrapped(inner))


def _needs_its_base(layer: Any, adapter: str, resized: bool) -> bool:
    if isinstance(layer, ModulesToSaveWrapper) and adapter in layer.modules_to_save:
        return False  # the trained copy is whole
    if resized:
        return True
    return isinstance(layer, BaseTunerLayer) and adapter in layer._get_available_adapters()


def _vocabulary(config: Any) -> int | None:
    return getattr(_text(config), "vocab_size", None)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
