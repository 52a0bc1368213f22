"""Which adapters are handled, and that what is trainable beside them is updated as usual. One process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.engines.pairs import clean_name, find_pairs
from reflora_dist.methods.reference import refactored

CONFIG = RefLoRAConfig(method="reflora", warmup_steps=0)


class Net(nn.Module):
    """An embedding, a 1-D and a 2-D convolution, a norm, two linears and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.conv2(hidden[:, None]).mean(1)
        return self.head(self.second(self.first(self.norm(hidden)).relu()).mean(1))


def adapted(**lora: Any) -> nn.Module:
    """The model with LoRA in which B is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(**{"r": 3, "target_modules": ["first", "second"], **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def step(model: nn.Module, config: RefLoRAConfig = CONFIG) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One step of SGD with learning rate 1. Returns gradients and updates by parameter name."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    handle = attach(model, optimizer, config)
    model(torch.arange(40).view(4, 10) % 20).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step()
    assert handle.report().skipped_pairs == 0
    handle.detach()
    return gradients, {name: before[name] - p.detach() for name, p in parameters.items()}


def check_all_refactored(model: nn.Module) -> set[str]:
    """Each pair's update is the refactored gradient; all else is its own gradient. Returns the latter's names."""
    factors = {}
    for pair in find_pairs(model):
        factors[pair.name] = (pair, pair.lora_a.detach().clone(), pair.lora_b.detach().clone())
    gradients, updates = step(model)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for pair, a, b in factors.values():
        name_a, name_b = names[id(pair.lora_a)], names[id(pair.lora_b)]
        seen |= {name_a, name_b}
        flat = (a.reshape(pair.shape_a), b.reshape(pair.shape_b))
        grads = (gradients[name_a].reshape(pair.shape_a), gradients[name_b].reshape(pair.shape_b))
        expected = refactored(*flat, *grads)
        for name, exact, shape in ((name_a, expected[0], pair.shape_a), (name_b, expected[1], pair.shape_b)):
            torch.testing.assert_close(updates[name].reshape(shape), exact.float(), rtol=1e-4, atol=1e-6)
            assert not torch.allclose(updates[name], gradients[name], rtol=1e-2)
    for name in set(gradients) - seen:
        torch.testing.assert_close(updates[name], gradients[name], rtol=1e-4, atol=1e-6)
    return set(gradients) - seen


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"first": 2, "second": 5}},
        {"lora_bias": True},
        {"target_modules": ["embedding"]},
        {"target_modules": ["conv1"]},
        {"target_modules": ["conv2"]},
        {"target_modules": ["embedding", "conv1", "conv2", "first", "second"], "r": 2},
    ],
    ids=["linear", "rslora", "rank_pattern", "lora_bias", "embedding", "conv1d", "conv2d", "all"],
)
def test_kinds_of_adapters(lora: dict[str, Any]) -> None:
    """S^-1 grad_A and grad_B S reach the optimizer, whatever module is adapted and whatever r the pairs have."""
    others = check_all_refactored(adapted(**lora))
    assert all("lora_B" in name and name.endswith("bias") for name in others)


def test_dora_leaves_the_magnitude_to_the_optimizer() -> None:
    others = check_all_refactored(adapted(use_dora=True))
    assert others and all("lora_magnitude_vector" in name for name in others)


def test_modules_to_save_and_norms_are_updated_as_usual() -> None:
    model = adapted(modules_to_save=["head"])
    model.base_model.model.norm.weight.requires_grad_(True)
    others = check_all_refactored(model)
    assert any("head.modules_to_save" in name for name in others) and any("norm.weight" in name for name in others)


def test_only_active_adapters_are_refactored() -> None:
    """Of two adapters the active one; of two active ones both."""
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    assert [pair.adapter for pair in find_pairs(model)] == ["default", "default"]
    model.set_adapter("other")
    assert [pair.name.rsplit(".", 1)[1] for pair in find_pairs(model)] == ["other"]
    model.base_model.set_adapter(["default", "other"])
    nn.init.normal_(model.base_model.model.first.lora_B["other"].weight)
    assert sorted(pair.lora_rank for pair in find_pairs(model)) == [2, 3, 3]
    check_all_refactored(model)


def test_shapes_of_pairs() -> None:
    """A convolution's factors count as matrices."""
    model = adapted(target_modules=["conv1", "embedding", "first"])
    shapes = {pair.name.split(".")[-2]: (pair.shape_a, pair.shape_b) for pair in find_pairs(model)}
    assert shapes == {
        "embedding": ((3, 20), (12, 3)), "conv1": ((3, 36), (8, 3)), "first": ((3, 8), (10, 3))
    }  # fmt: skip


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=2)


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (Grouped(), ["conv"], "convolution with groups=2"),
        (WithAttention(), ["attention"], "MultiheadAttention LoRA layer, which is not supported"),
    ],
)
def test_adapters_without_one_product_are_refused(model: nn.Module, targets: list[str], message: str) -> None:
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match=message):
        attach(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), CONFIG)


def test_unknown_variants_are_refused() -> None:
    model = adapted()
    layer = model.base_model.model.first
    layer.lora_variant["default"] = type("FutureLinearVariant", (), {})()
    with pytest.raises(ValueError, match=r"first\.default uses FutureLinearVariant, which is not supported"):
        find_pairs(model)


def test_factors_in_freed_buffers_are_not_tied() -> None:
    """FSDP1 leaves views of a flat buffer on modules when it frees the buffer: same places, other buffers."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    for layer in model.base_model.model:
        flat = torch.zeros(40)
        for start, side in ((8, layer.lora_A), (16, layer.lora_B)):
            weight = side["default"].weight
            weight.data = flat[start : start + 8].view(weight.shape)
        flat.untyped_storage().resize_(0)
    assert len(find_pairs(model)) == 2


def test_names_do_not_show_wrappers() -> None:
    assert clean_name("module._orig_mod.base.layers.0._checkpoint_wrapped_module.q") == "base.layers.0.q"
    assert clean_name("_fsdp_wrapped_module.base.module.q") == "base.module.q"


def test_a_pair_without_s_trains_as_plain_lora_and_is_counted() -> None:
    """r > in: the Gram is singular at every step. B = 0: at the first step only."""
    model = adapted(r=2, rank_pattern={"first": 9})  # in is 8
    nn.init.zeros_(model.base_model.model.second.lora_B["default"].weight)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    handle = attach(model, optimizer, CONFIG)
    for number_skipped in (2, 3):
        model(torch.arange(40).view(4, 10) % 20).square().sum().backward()
        gradient = model.base_model.model.first.lora_A["default"].weight.grad
        before = gradient.clone()
        optimizer.step()
        assert torch.equal(gradient, before)
        assert handle.report().skipped_pairs == number_skipped
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in model.parameters())
