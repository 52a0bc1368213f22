"""A PEFT model without its base: only the adapter's parameters are off the meta device."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoints.embeddings import saved_embeddings, set_vocabulary
from ..files.base_files import read_model_config, require_size
from ..files.open_files import cause_of, readable
from ..files.stored_weights import StoredWeights
from ..lora_sb.layer import LoraXSLinear

ADAPTER = "default"
_LAYERS = (Linear, Embedding, Conv1d, Conv2d, Conv3d, LoraXSLinear)
_VARIANTS = (DoraLinearVariant, DoraEmbeddingVariant, DoraConv1dVariant, DoraConv2dVariant)
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def empty_base(
    stored: StoredWeights, source: Path, config: PeftConfig, tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> Any:
    """Build the base of these weights on the meta device, in the class that the adapter was trained on.

    Args:
        stored: the base's weights; only shapes and dtypes are read.
        source: the adapter's folder.
        config: the adapter's configuration.
        tensors: the adapter's tensors by PEFT's names; they tell the number of labels and of tokens.
        dtype: dtype of the parameters; None: as in the base's configuration.

    Raises:
        ValueError: the base is quantized, or a configuration cannot be used.
    """
    folder = stored.folder
    settings = read_model_config(str(folder))
    require_size(folder, settings, [shape for shape, _ in stored.specs.values()])
    if getattr(settings, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized, so a merge would not be exact: give the base that it was made from")
    labels = [tensors[key].shape[0] for key in tensors if key.endswith(_HEADS)]
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS") and labels and settings.num_labels != labels[0]:
        settings.num_labels = labels[0]
    chosen = model_class(source, config, settings)
    remedy = "correct it, or name the base that the adapter was trained on"
    make = chosen.from_config if hasattr(chosen, "from_config") else chosen._from_config
    kind = {"dtype": dtype or settings.dtype or torch.float32}
    with readable(folder / "config.json", remedy), torch.device("meta"):
        base = make(settings, **kind)
        rows = {weight.shape[0] for weight in saved_embeddings(base, tensors).values()}
        if len(rows) != 1 or rows == {base.get_input_embeddings().weight.shape[0]}:
            return base
        set_vocabulary(settings, rows.pop())  # tokens were added before training
        return make(settings, **kind)


def model_class(source: Path, config: PeftConfig, settings: Any) -> Any:
    """Return the class of transformers that the adapter was trained on.

    Args:
        source: the adapter's folder, for messages.
        config: the adapter's configuration.
        settings: the base's configuration.

    Raises:
        ValueError: the configurations name no class of transformers.
    """
    if config.task_type in list(_AUTO_CLASSES):
        return getattr(transformers, _AUTO_CLASSES[str(config.task_type)])
    mapping: Any = config.auto_mapping or {}
    with readable(source / "adapter_config.json", "correct its task_type or auto_mapping"):
        if mapping:
            library = mapping["parent_library"]
            if not library.startswith("transformers."):  # other imports could run any code
                raise ValueError(f"its auto_mapping names {library}, and models of transformers can be merged")
            return getattr(importlib.import_module(library), mapping["base_model_class"])
        if settings.architectures:
            return getattr(transformers, settings.architectures[0])
        raise ValueError("neither its task_type nor the base's architectures name the model's class")


def with_adapter(
    base: Any, config: PeftConfig, tensors: dict[str, Tensor], source: Path, *, by_weight: bool = True
) -> PeftModel:
    """Return the PEFT model of a base, with the adapter's parameters in the dtypes that PEFT gives them.

    Args:
        base: the base, on the meta device or not.
        config: the adapter's configuration.
        tensors: the adapter's tensors by PEFT's names.
        source: the adapter's folder, for messages.
        by_weight: refuse kinds of adapters that cannot be merged weight by weight.

    Raises:
        ValueError: the adapter does not fit the base, is damaged, or is of a kind that cannot be merged.
    """
    folder = base.config._name_or_path
    try:
        with torch.device("meta"):
            model = PeftModel(base, config, ADAPTER)
    except Exception as error:  # no module has one of the target names, or PEFT rejects the configuration
        raise ValueError(f"the adapter in {source} does not fit the base in {folder}: {cause_of(error)}") from error
    if by_weight:
        _refuse_unsupported(model, source)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False) if _is_adapters(model, name)}
    _make_room(model, own | tensors.keys())
    try:
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
    except Exception as error:
        raise ValueError(f"the adapter in {source} does not fit the base in {folder}: {cause_of(error)}") from error
    lacking = sorted(own.intersection(result.missing_keys))
    if lacking or result.unexpected_keys:
        problem = f"lacks {lacking[0]}" if lacking else f"holds {result.unexpected_keys[0]}, which has no place"
        raise ValueError(f"the adapter in {source} {problem}: it belongs to another base than {folder}, or is damaged")
    return model


def _make_room(model: PeftModel, names: set[str]) -> None:
    """Replace the parameters of these names, and those tied to them, by empty ones on the CPU."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]): parameters[name] for name in names & parameters.keys()}
    made = {key: nn.Parameter(torch.empty_like(p, device="cpu"), requires_grad=False) for key, p in wanted.items()}
    for name, parameter in parameters.items():
        if id(parameter) in made:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = made[id(parameter)]


def _is_adapters(model: PeftModel, name: str) -> bool:
    """Return whether a parameter belongs to the adapter, not to the base."""
    layer, path, inside = None, "", ""
    for part in name.split(".")[:-1]:
        path = f"{path}.{part}" if path else part
        module = model.get_submodule(path)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            layer, inside = module, name.removeprefix(path + ".")
    return layer is not None and not inside.startswith(("base_layer.", "original_module."))


def _refuse_unsupported(model: PeftModel, source: Path) -> None:
    for name, module in model.named_modules():
        other_layer = isinstance(module, BaseTunerLayer) and type(module) not in _LAYERS
        other_wrapper = isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper)
        if other_layer or other_wrapper:
            raise ValueError(
                f"the adapter in {source} makes {name} a {type(module).__name__}, which cannot be merged weight by "
                "weight: use PEFT's merge"
            )
        for variant in getattr(module, "lora_variant", {}).values():
            if not isinstance(variant, _VARIANTS):
                raise ValueError(
                    f"the adapter in {source} has the LoRA variant {type(variant).__name__} at {name}, which is not "
                    "supported: use PEFT's merge"
                )
