"""The layer of LoRA-XS and LoRA-SB: ``W + s B R A``; only R ``[r, r]`` is trained."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .config import LoraXSConfig


class LoraXSLinear(nn.Module, BaseTunerLayer):
    """A linear layer ``W`` ``[out, in]`` with adapters ``s B R A``.

    Shapes:
        lora_xs_A  [r, in]   frozen
        lora_xs_R  [r, r]    trained, zero at first
        lora_xs_B  [out, r]  frozen

    All three are parameters, so that engines shard, move and gather them like any other. Before initialization
    (:func:`initialize_lora_sb`, :func:`initialize_lora_xs`) or loading, A and B are random and R = 0, so the layer
    computes the same as its base.
    """

    # PEFT trains the parameters in the first; those in the second it moves, deletes and saves, but leaves frozen
    adapter_layer_names = ("lora_xs_R",)
    other_param_names = ("lora_xs_A", "lora_xs_B", "lora_xs_dropout", "r", "lora_alpha", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraXSConfig, r: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = self.get_base_layer()
        assert isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        # keyed by adapter; typed Any, since mypy knows only Module for a ModuleDict's values
        self.lora_xs_dropout: Any = nn.ModuleDict()
        self.lora_xs_A: Any = nn.ModuleDict()
        self.lora_xs_B: Any = nn.ModuleDict()
        self.lora_xs_R: Any = nn.ModuleDict()
        self.cast_input_dtype_enabled = True
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, alpha)

    def update_layer(self, adapter_name: str, config: LoraXSConfig, r: int, alpha: float) -> None:
        """Add an adapter. The method's name is PEFT's.

        Args:
            adapter_name: the adapter's name.
            config: its configuration, for dropout and inference mode.
            r: its r in this layer.
            alpha: its alpha in this layer; ``s = alpha / r``.

        Raises:
            ValueError: r is not between 1 and the smaller side of the weight.
        """
        if not 1 <= r <= min(self.in_features, self.out_features):
            raise ValueError(
                f"{r=} must be between 1 and {min(self.in_features, self.out_features)}, the smaller side of a weight "
                f"[{self.out_features}, {self.in_features}]: lower r, or give this module its own in rank_pattern"
            )
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / r
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_xs_dropout[adapter_name] = dropout
        self.lora_xs_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_xs_B[adapter_name] = nn.Linear(r, self.out_features, bias=False)
        self.lora_xs_R[adapter_name] = nn.Linear(r, r, bias=False)
        nn.init.normal_(self.lora_xs_A[adapter_name].weight, std=self.in_features**-0.5)
        nn.init.normal_(self.lora_xs_B[adapter_name].weight, std=self.out_features**-0.5)
        nn.init.zeros_(self.lora_xs_R[adapter_name].weight)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for frozen in (self.lora_xs_A, self.lora_xs_B):
            frozen[adapter_name].requires_grad_(False)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights ``B``, ``R``, ``A`` as the engine holds them, perhaps sharded."""
        weights = [module[adapter].weight for module in (self.lora_xs_B, self.lora_xs_R, self.lora_xs_A)]
        return weights[0], weights[1], weights[2]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``s B R A`` ``[out, in]`` in R's dtype; it is computed in at least float32."""
        factors = self.factors(adapter)
        wide = torch.promote_types(factors[1].dtype, torch.float32)
        b, r, a = (factor.to(wide) for factor in factors)
        return (self.scaling[adapter] * (b @ r @ a)).to(factors[1].dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: adapters to merge; None: the active ones.

        Raises:
            ValueError: ``safe_merge`` is set and a merged weight is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_xs_R:
                continue
            weight = self.get_base_layer().weight
            assert isinstance(weight, Tensor)
            merged = weight.data + self.get_delta_weight(adapter).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights: adapter {adapter} is broken")
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base weight."""
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        while self.merged_adapters:
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_xs_R:
                factor_a, factor_b = self.lora_xs_A[adapter], self.lora_xs_B[adapter]
                x = self._cast_input_dtype(x, factor_a.weight.dtype)
                latent = self.lora_xs_R[adapter](factor_a(self.lora_xs_dropout[adapter](x)))
                result = result + factor_b(latent) * self.scaling[adapter]
        return result.to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that its ``convert_to_lora`` works. It needs an SVD; ``convert_adapter`` does not."""
        return True

    def __repr__(self) -> str:
        return "lora_xs." + super().__repr__()
