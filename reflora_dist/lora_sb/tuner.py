"""The adapter as a PEFT method. Importing this module registers it, so that ``PeftModel.from_pretrained`` knows it.

PEFT's ``register_peft_method`` accepts only names of a closed enumeration, so this module fills its public tables.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from .config import LoraXSConfig, LoraXSType
from .layer import LoraXSLinear


class LoraXSModel(BaseTuner):
    """Inserts the adapters into a model; ``peft.get_peft_model(model, LoraXSConfig(...))`` creates it."""

    prefix = "lora_xs_"
    tuner_layer_cls = LoraXSLinear  # type: ignore[assignment]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: LoraXSConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        r_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        r = peft_config.rank_pattern.get(r_key, peft_config.r)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        settings = (peft_config, r, float(r if alpha is None else alpha))
        if isinstance(target, LoraXSLinear):
            target.update_layer(adapter_name, *settings)
            return
        _require_linear(current_key, target)
        layer = LoraXSLinear(target, adapter_name, *settings)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter stays frozen until it is activated
        self._replace_module(parent, target_name, layer, target)


def _require_linear(name: str, target: nn.Module) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, nn.Linear):
        raise TypeError(f"{name} is a {type(base).__name__}; only nn.Linear is supported: leave it out")
    if not base.weight.is_floating_point() or hasattr(base.weight, "quant_state"):
        raise TypeError(
            f"{name} is quantized ({type(base).__name__}, {base.weight.dtype}), which is not supported: neither its "
            "weight (LoRA-XS) nor a merge of the adapter would be exact; load the base in bf16 or fp32"
        )


def register() -> None:
    """Register the method with PEFT."""
    key: Any = LoraXSType.REFLORA_DIST_LORA_XS
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = LoraXSConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = LoraXSModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = LoraXSModel.prefix


register()
