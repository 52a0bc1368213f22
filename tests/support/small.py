"""A small network with adapters and a regression: a step takes a millisecond, and everything is in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.matrices import factor
from tests.support.oracles import factors_in_pairs
from tests.support.workloads import (
    Factors,
    named_factors,
)

IN, HIDDEN, OUT = 10, 14, 9


class SmallNet(nn.Module):
    """Two adapted layers and a norm between them; it rounds nothing to fp32, as a LLaMA's loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(IN, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)
        self.head = nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x).tanh())).tanh())


def small_model(
    seed: int = 0, *, from_zero: bool = False, dtype: torch.dtype = torch.float64, **lora: Any
) -> PeftModel:
    """A PEFT model of it: PEFT's start where ``from_zero``, else random factors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"], **lora}
        model = get_peft_model(SmallNet(), LoraConfig(**settings)).to(dtype)
        if not from_zero:
            with torch.no_grad():
                for each in named_factors(model).values():
                    each.normal_(std=0.4)
    return model


def small_batches(steps: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs ``[steps, 24, IN]``."""
    return torch.randn(steps, 24, IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def backward(model: nn.Module, batch: Tensor, scale: float = 1.0) -> float:
    """A loss of order one and its gradients."""
    loss = scale * (model(batch) - batch[:, :3].sin()).square().mean()
    loss.backward()
    return loss.item()


def train_small(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    after_step: Callable[[], None] = lambda: None,
    scale: float = 1.0,
) -> Factors:
    """Plain training; the factors at its end."""
    for batch in batches:
        backward(model, batch, scale)
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return {name: each.detach().clone() for name, each in named_factors(model).items()}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def products(model: nn.Module) -> list[Tensor]:
    """``s B A`` of every pair."""
    return [pair.scaling * (pair.lora_b @ pair.lora_a).detach() for pair in find_pairs(model)]


def own_optimizer(method: str, model: nn.Module, **settings: Any) -> Any:
    """An attached optimizer of a method that is one, of all that is trainable, and its handle."""
    optimizer = METHOD_OPTIMIZERS[method](trainable(model), **{"lr": 0.02, **settings})
    return optimizer, attach(model, optimizer, RefLoRAConfig(method=method))


rite = functools.partial(own_optimizer, "lora-rite")
muon = functools.partial(own_optimizer, "lora-muon")


def mixed(model: nn.Module, condition: float) -> nn.Module:
    """The same products from other factors, ``(M A, B M^-1)``."""
    with torch.no_grad():
        for seed, (lora_a, lora_b) in enumerate(zip(*[iter(factors_in_pairs(model))] * 2, strict=True)):
            mix = 3.0 * factor(lora_a.shape[0], lora_a.shape[0], condition, seed)
            lora_a.copy_(mix @ lora_a)
            lora_b.copy_(lora_b @ torch.linalg.inv(mix))
    return model


def product_distance(
    make: Callable[[nn.Module], torch.optim.Optimizer], condition: float, steps: int = 6
) -> tuple[float, float]:
    """How far the products of the two starts are apart after some steps, and how far they have moved."""
    start = products(small_model())
    ends = []
    for model in (small_model(), mixed(small_model(), condition)):
        train_small(model, make(model), small_batches(steps))
        ends.append(products(model))

    def largest(left: list[Tensor], right: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(left, right, strict=True))

    return largest(ends[1], ends[0]), largest(ends[0], start)
