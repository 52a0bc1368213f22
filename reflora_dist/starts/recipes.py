"""Computation of the initial factors. Nothing here knows about ranks or engines."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..engines.pairs import AdapterPair
from ..engines.whole_parameters import whole_shape
from .base_change import compute_device
from .base_weights import stored_transposed

KAIMING_BOTH = "kaiming_both"
_PEFT = re.compile(r"pissa|pissa_niter_[1-9]\d*|olora|lora_ga")
_REFUSED = {
    "corda": "needs covariances of activations, estimated on data by PEFT's preprocess_corda",
    "eva": "needs the activations of a forward on data (PEFT's initialize_lora_eva_weights), and leaves B = 0",
    "loftq": "quantizes the base",
    "mica": "freezes lora_B, so there is no S",
}


def check_init(init: str) -> None:
    """Refuse an unknown ``init``.

    Raises:
        ValueError: the message names the value, the reason and the supported values.
    """
    if init == KAIMING_BOTH or _PEFT.fullmatch(init):
        return
    reason = f" {_REFUSED[init]};" if init in _REFUSED else ""
    raise ValueError(
        f"init={init!r} is not supported:{reason} use {KAIMING_BOTH}, pissa, pissa_niter_N, olora or lora_ga"
    )


def needs_base(init: str) -> bool:
    """Return whether the factors are computed from the base weight; "lora_ga" uses its gradient instead."""
    return init.startswith("pissa") or init == "olora"


def refuse_layers(pair: AdapterPair, init: str) -> None:
    """Refuse a layer that PEFT's initialization does not support.

    Raises:
        ValueError: the layer is not linear, or smaller than the number of singular vectors; the message names the
            adapter.
    """
    if pair.of_a_parameter:
        raise ValueError(
            f"init={init!r} changes the weights of layers, and {pair.name} adapts a parameter (target_parameters); "
            "keep PEFT's start, lora_B = 0"
        )
    if init == KAIMING_BOTH:
        return
    if not isinstance(pair.layer.get_base_layer(), (nn.Linear, Conv1D)):
        kind = type(pair.layer.get_base_layer()).__name__
        raise ValueError(f"init={init!r} is for linear layers and {pair.name} is on {kind}; use {KAIMING_BOTH}")
    least = 2 * pair.lora_rank if init == "lora_ga" else pair.lora_rank
    if least > min(pair.in_features, pair.out_features):
        raise ValueError(
            f"init={init!r} takes {least} singular vectors and the weight of {pair.name}, {pair.out_features} x "
            f"{pair.in_features}, has fewer: lower r={pair.lora_rank}, leave the layer out, or use {KAIMING_BOTH}"
        )


def kaiming_both(pair: AdapterPair) -> tuple[Tensor, Tensor]:
    """Draw both factors as the published RefLoRA restart does: uniform, |A| <= 1 / sqrt(in) and |B| <= 1 / sqrt(r).

    The values are drawn in fp32 from torch's CPU generator, A first. With the same seed and the same PEFT model they
    equal the published code's values.

    Returns:
        lora_A ``[r, in]`` and lora_B ``[out, r]``; factors of convolutions and embeddings keep their own shapes.
    """
    factors = [torch.empty(whole_shape(factor), dtype=torch.float32) for factor in (pair.lora_a, pair.lora_b)]
    for factor in factors:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return factors[0], factors[1]


def peft_factors(
    pair: AdapterPair, init: str, weight: Tensor | None, gradient: Tensor | None, lora_ga_config: Any = None
) -> tuple[Tensor, Tensor]:
    """Compute PEFT's own initialization on a copy; the model and torch's generators do not change.

    PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775), LoRA-GA (arXiv 2407.05000).

    Args:
        pair: a pair on a linear layer.
        init: PEFT's ``init_lora_weights``.
        weight: the whole base weight as the layer stores it; None for "lora_ga", which does not read it.
        gradient: the gradient of the loss with respect to that weight, for "lora_ga".
        lora_ga_config: PEFT's ``LoraGAConfig``.

    Returns:
        lora_A ``[r, in]`` and lora_B ``[out, r]``, fp32.
    """
    device = compute_device(torch.device("cpu"))  # a CPU is many times slower at decompositions
    copied = torch.zeros(pair.shape_b[0], pair.shape_a[1], device=device)
    if weight is not None:
        copied.copy_(_as_linear(pair, weight.detach()))
    linear = nn.utils.skip_init(nn.Linear, pair.in_features, pair.out_features, bias=False, device=device)
    linear.weight = nn.Parameter(copied, requires_grad=False)
    if gradient is not None:
        linear._peft_loraga_grad = _as_linear(pair, gradient).to(device, torch.float32)  # type: ignore[assignment]
    config = LoraConfig(
        r=pair.lora_rank,
        lora_alpha=pair.layer.scaling[pair.adapter] * pair.lora_rank,  # type: ignore[arg-type]
        target_modules=["linear"],
        init_lora_weights=init,  # type: ignore[arg-type]
        lora_ga_config=lora_ga_config,
    )
    with torch.random.fork_rng():
        layer: Any = inject_adapter_in_model(config, nn.ModuleDict({"linear": linear}))["linear"]  # type: ignore[index]
    factors = [getattr(layer, name)["default"].weight.detach().to("cpu").contiguous() for name in ("lora_A", "lora_B")]
    for factor, shape in zip(factors, (pair.shape_a, pair.shape_b), strict=True):
        assert factor.shape == shape, f"{init} gave {pair.name} a factor {tuple(factor.shape)}, not {shape}"
    return factors[0], factors[1]


def _as_linear(pair: AdapterPair, tensor: Tensor) -> Tensor:
    return tensor.T if stored_transposed(pair) else tensor
