"""A small network with stacked experts, and its twin whose experts are layers of their own."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from reflora_dist import tall_adapters
from tests.support.engines_under_test.common import Wrapped, optimizer_of
from tests.support.engines_under_test.zero import Zero, zero_config
from tests.support.workloads import Factors, Settings, named_factors

EXPERTS, LORA_RANK = 4, 2
IN, HIDDEN, OUT = 9, 12, 7
UP, DOWN = "up", "down"
_SIZES = {UP: (IN, HIDDEN), DOWN: (HIDDEN, OUT)}


class Stack(nn.Module):
    """Experts in one parameter: ``[E, out, in]``, or ``[E, in, out]`` if ``is_transposed``, as PEFT reads it."""

    def __init__(self, n_in: int, n_out: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(EXPERTS, *((n_in, n_out) if is_transposed else (n_out, n_in))) / n_in)

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        weight = self.weight if self.is_transposed else self.weight.mT
        return sum((route == e).to(x.dtype)[:, None] * (x @ weight[e]) for e in range(EXPERTS))  # type: ignore[return-value]


class Loop(nn.Module):
    """The same experts as layers."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(n_in, n_out, bias=False) for _ in range(EXPERTS)])

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        return sum((route == e).to(x.dtype)[:, None] * layer(x) for e, layer in enumerate(self.experts))  # type: ignore[return-value]


class ExpertNet(nn.Module):
    """Two layers of experts. Expert 3 sees no token in odd steps."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.up = Stack(*_SIZES[UP], is_transposed=False) if stacked else Loop(*_SIZES[UP])
        self.down = Stack(*_SIZES[DOWN], is_transposed=True) if stacked else Loop(*_SIZES[DOWN])

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        return self.down(self.up(x, route).tanh(), route)


def expert_model(*, from_zero: bool = False, dtype: torch.dtype = torch.float64, **lora: Any) -> PeftModel:
    """A PEFT model with stacked experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"r": LORA_RANK, "lora_alpha": 6, "target_modules": [], **lora}
        settings["target_parameters"] = [f"{name}.weight" for name in _SIZES]
        model = get_peft_model(ExpertNet(stacked=True), LoraConfig(**settings)).to(dtype)
        if not from_zero:
            with torch.no_grad():
                for factor in named_factors(model).values():
                    factor.normal_(std=0.5)
    return model


def twin_of(model: PeftModel) -> PeftModel:
    """The model with a layer for every expert, and the same weights and factors."""
    lora = {"r": LORA_RANK, "lora_alpha": 6, "target_modules": r".*experts\.\d+"}
    twin = get_peft_model(ExpertNet(stacked=False), LoraConfig(**lora)).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name in _SIZES:
            stack = model.get_submodule(f"base_model.model.{name}").get_base_layer()
            weight = stack.weight.mT if stack.is_transposed else stack.weight
            for e, layer in enumerate(twin.get_submodule(f"base_model.model.{name}").experts):
                layer.base_layer.weight.copy_(weight[e])
        copies = by_expert(named_factors(model))
        for name, factor in named_factors(twin).items():
            factor.copy_(copies[name])
    return twin


def by_expert(factors: Factors) -> Factors:
    """Factors of stacked experts, ``[E r, in]`` and ``[out, r E]``, under the names that they have in the twin."""
    apart = {}
    for name, factor in factors.items():
        before, _, after = name.partition(".lora_")
        for e in range(EXPERTS):
            own = factor[e * LORA_RANK : (e + 1) * LORA_RANK] if after.startswith("A") else factor[:, e::EXPERTS]
            apart[f"{before}.experts.{e}.lora_{after}"] = own
    return apart


def expert_batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Inputs ``[24, IN]`` and the expert of each."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for step in range(steps):
        route = torch.arange(24) % (EXPERTS - step % 2)
        batches.append((torch.randn(24, IN, generator=generator, dtype=dtype), route))
    return batches


def expert_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, route = batch
    return (model(x, route) - x[:, :OUT].sin()).square().mean()


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    expert_loss(model, batch).backward()


def wrap_experts(engine_name: str, model: PeftModel, settings: Settings, more: dict[str, Any] | None = None) -> Wrapped:
    """The model as an engine returns it; ``+tall`` stores lora_A tall before, ``more`` are settings of DeepSpeed."""
    engine_name, _, tall = engine_name.partition("+")
    if tall:
        assert tall_adapters(model) == len(_SIZES)
    layers = [model.get_submodule(f"base_model.model.{name}") for name in _SIZES]
    if engine_name == "ddp":
        ddp = DistributedDataParallel(model)
        return Wrapped(ddp, optimizer_of(ddp, settings), settings)
    if engine_name == "fsdp2":
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        return Wrapped(model, optimizer_of(model, settings), settings)
    if engine_name == "fsdp1":
        policy = ModuleWrapPolicy({type(layer) for layer in layers})
        fsdp1 = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        return Wrapped(fsdp1, optimizer_of(fsdp1, settings), settings)
    config = zero_config(settings, 24, int(engine_name[4])) | (more or {})
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer_of(model, settings), config=config)
    return Zero(engine, optimizer, settings)
