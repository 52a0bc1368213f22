"""The base's embedding and head in an adapter's files, for a model whose vocabulary is not its base's.

Tokens were added and ``resize_token_embeddings`` was called: then the base alone no longer gives these weights back.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from ..engines.pairs import clean_name
from ..engines.whole_parameters import Owner, whole_shape

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# where an adapter's file holds an embedding: as it is, or inside of what PEFT put around it
_PLACES = ("", ".base_layer", ".token_adapter.base_layer", ".original_module")
_TOKENS = ".token_adapter.trainable_tokens_delta"


def embedding_names(peft_model: PeftModel, owners: Mapping[str, Owner]) -> dict[str, str]:
    """The parameters of the base's embedding and head, by the keys that an adapter's file has for them.

    A tied weight, and a module that the model has under several paths, have several keys.
    """
    wanted = {id(_base(layer)) for layer in _layers(peft_model)}
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
    """The part of :func:`embedding_names` that goes into an adapter's file, each parameter once.

    As PEFT's ``save_embedding_layers="auto"``: all if the vocabulary was resized, else what LoRA adapts. Where LoRA
    adapts one of the two, PEFT leaves out the other, and so loses resized rows.
    """
    layers = {id(_base(layer)): layer for layer in _layers(peft_model) if _needs_its_base(layer, adapter, resized)}
    kept: dict[str, str] = {}
    seen: set[int] = set()
    for key, name in embedding_names(peft_model, owners).items():
        parameter = getattr(*owners[name])
        if id(owners[name][0]) in layers and id(parameter) not in seen:
            seen.add(id(parameter))
            kept[key] = name
    return kept


def vocabulary_is_resized(peft_model: PeftModel) -> bool:
    """Whether the model's vocabulary has another size than its base's. Asks this machine's files, never the hub."""
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
    """Of a model: itself, or its place in the hub's cache. transformers would ask the hub, and wait for it."""
    if name and Path(name).is_dir():
        return name
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise FileNotFoundError(name)
    return str(Path(found).parent)


def is_spare(key: str, others: Collection[str] = ()) -> bool:
    """Whether PEFT writes this key beside a trained copy of a resized embedding, and no model needs it.

    Args:
        others: the keys that the model needs.
    """
    if key.endswith(_TOKENS):
        return any(other.endswith(_TOKENS) for other in others)  # of the head that is tied to the embedding
    return key.endswith((".modules_to_save.weight", ".original_module.weight"))


def saved_embeddings(base: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embedding and the head of ``base`` that an adapter's file holds, by their paths in it."""
    layers = {id(layer) for layer in _layers(base)}
    found: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        keys = [f"base_model.model.{path}{place}.weight" for place in _PLACES] if id(module) in layers else []
        found |= {path: tensors[key] for key in keys if key in tensors}  # noqa: B035  (one of the keys at most)
    return found


def resize_for(base: Any, tensors: Mapping[str, Tensor], source: Any) -> None:
    """Give a base the vocabulary of the adapter in ``tensors``, which bring the rows when they are loaded.

    Raises:
        ValueError: they bring the rows of the embedding or of the head only.
    """
    found = saved_embeddings(base, tensors)
    rows = {weight.shape[0] for weight in found.values()}
    if len(rows) != 1 or rows == {whole_shape(base.get_input_embeddings().weight)[0]}:
        return
    brought = {id(base.get_submodule(path).weight) for path in found}
    lacking = [type(layer).__name__ for layer in _layers(base) if id(layer.weight) not in brought]
    if lacking:
        raise ValueError(
            f"{source} was trained with a vocabulary of {rows.pop()} and holds {', '.join(found)} but not the "
            f"{'embedding' if lacking[0] == 'Embedding' else 'head'}: save it anew with save_adapter"
        )
    base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def set_vocabulary(config: Any, size: int) -> None:
    """Give a model's configuration another size of the vocabulary."""
    _text(config).vocab_size = size


def _layers(model: Any) -> Iterator[nn.Module]:
    """Input embedding and head, as far as there are any, as PEFT left them."""
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, name)()
        except (AttributeError, NotImplementedError):  # no model of transformers, or one without a text
            continue
        if isinstance(layer, nn.Module):
            yield _unwrapped(layer)


def _unwrapped(layer: nn.Module) -> nn.Module:
    while wrapped := next((layer._modules[name] for name in _WRAPPERS if name in layer._modules), None):
        layer = wrapped
    return layer


def _base(layer: nn.Module) -> nn.Module:
    """The base's own module in what PEFT put around it."""
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
