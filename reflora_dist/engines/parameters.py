"""The base of engines whose optimizer updates the model's own parameters, whole or sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Engine
from .pairs import AdapterPair


class ParameterEngine(Engine):
    """An engine whose optimizer holds the factors themselves, whole or sharded.

    Raises:
        ValueError: the optimizer does not hold all factors, or a factor is not contiguous.
    """

    def __init__(self, pairs: Sequence[AdapterPair], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(pairs, optimizer)
        self._check_ownership(
            ValueError, "create the optimizer from the model's parameters after wrapping it, or pass the right one"
        )
        for name, weight in zip(self._factor_names(), self.weights(), strict=True):
            if not weight.is_contiguous():
                raise ValueError(
                    f"{name} has strides {weight.stride()}, and its rows have to follow each other in memory: give the "
                    "adapter's weights back their layout (memory_format=torch.contiguous_format)"
                )
        self._layout_at_attach = self._current_layout()

    def weights(self) -> list[Tensor]:
        return self._factors()

    def gradients(self) -> list[Tensor | None]:
        return [factor.grad for factor in self._factors()]

    def moments(self) -> list[dict[str, Tensor]]:
        # Adam's step count is 0-dim, and no moment.
        states = [self.optimizer.state.get(factor, {}) for factor in self._factors()]
        return [
            {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
            for state in states
        ]

    def holders(self) -> list[tuple[Tensor, int]]:
        return [(factor, 0) for factor in self._factors()]

    def check(self) -> None:
        if self._current_layout() != self._layout_at_attach:
            raise RuntimeError(
                "the model was sharded or moved after attach(): call attach(model, optimizer, config) with what "
                "fully_shard / FSDP / deepspeed.initialize / accelerator.prepare returned"
            )
        self._check_ownership(RuntimeError, "the optimizer was rebuilt after attach(): detach, then attach again")

    def _current_layout(self) -> list[tuple[type, torch.Size, torch.device]]:
        return [
            (type(factor.data), weight.shape, weight.device)
            for factor, weight in zip(self._factors(), self.weights(), strict=True)
        ]

    def _check_ownership(self, error: type[Exception], remedy: str) -> None:
        owned = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        missing = [n for n, f in zip(self._factor_names(), self._factors(), strict=True) if id(f) not in owned]
        if missing:
            name = type(self.optimizer).__name__
            raise error(f"{name} does not hold {len(missing)} of the factors ({missing[0]}, ...): {remedy}")

    def _check_whole(self) -> None:
        for pair in self.pairs:
            numel = pair.lora_a.numel() + pair.lora_b.numel()
            if numel != pair.width * (pair.in_features + pair.out_features):
                raise ValueError(f"{pair.name} is sharded, but not the model given: pass the wrapped model")
