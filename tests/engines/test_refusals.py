"""What bad input gets: a clear error on every rank, before any update, that names the value and the remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import RefLoRAConfig, attach, initialize_adapters
from reflora_dist.checkpoints.training_state import save_adapter

CONFIG = RefLoRAConfig(method="reflora", warmup_steps=0)
DEEPSPEED = {"train_micro_batch_size_per_gpu": 6, "zero_allow_untested_optimizer": True}


class Net(nn.Module):
    """Something small to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def adapted(**lora: Any) -> nn.Module:
    settings = {"r": 2, "target_modules": ["first", "second"], **lora}
    return get_peft_model(Net(), LoraConfig(**settings))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "refflora"},
            "method='refflora' is unknown; choose one of lora, balora, lora-muon, lora-pro, lora-rite",
        ),
        ({"interval": 0}, "interval=0 must be an integer of at least 1"),
        ({"interval": 1.5}, "interval=1.5"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": True}, "warmup_steps=True"),
        ({"method": "scaled-gd", "damping": "0.1"}, "damping='0.1' must be a number"),
        ({"damping": 0.5}, "damping=0.5 means nothing to method='reflora'"),
    ],
)
def test_config_values_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefLoRAConfig(**settings)


def test_config_of_another_type() -> None:
    model = adapted()
    with pytest.raises(TypeError, match="config is a dict; pass RefLoRAConfig"):
        attach(model, adamw(model), {"method": "reflora"})  # type: ignore[arg-type]


def test_no_adapter() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"no active LoRA adapter found in Net: .*get_peft_model"):
        attach(model, torch.optim.AdamW(model.parameters()), CONFIG)


def test_frozen_factors() -> None:
    model = adapted()
    optimizer = adamw(model)
    next(p for n, p in model.named_parameters() if "first.lora_A" in n).requires_grad_(False)
    with pytest.raises(ValueError, match=r"lora_A of .*first.default is frozen.*is_trainable=True"):
        attach(model, optimizer, CONFIG)


def test_merged_adapters() -> None:
    """The layers would leave out the factors, which then get no gradient."""
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"first.default is merged into the base: call unmerge_adapter\(\)"):
        attach(model, torch.optim.AdamW(trainable(model), lr=1e-3), CONFIG)
    model.unmerge_adapter()
    attach(model, torch.optim.AdamW(trainable(model), lr=1e-3), CONFIG)


def test_a_mixed_model() -> None:
    """PEFT cannot save it, so it is refused before it is trained."""
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]), mixed=True)
    for refusal in (
        lambda: attach(model, torch.optim.AdamW(trainable(model), lr=1e-3), CONFIG),
        lambda: save_adapter(model, "never-written"),
        lambda: initialize_adapters(model, "pissa"),
    ):
        with pytest.raises(TypeError, match=r"PeftMixedModel's adapters cannot be saved.*without mixed=True"):
            refusal()


def test_optimizer_that_does_not_own_the_factors() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"AdamW does not hold 4 of the factors .*lora_A"):
        attach(model, adamw(adapted()), CONFIG)


def test_optimizer_of_an_unknown_kind() -> None:
    with pytest.raises(TypeError, match="unknown optimizer dict: pass a torch optimizer"):
        attach(adapted(), {}, CONFIG)


class HomeMade(torch.optim.Muon):
    """Known neither by name nor by what it derives from."""


@pytest.mark.parametrize("kind", [HomeMade, torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SparseAdam])
def test_optimizer_that_is_not_elementwise(kind: type) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=f"{kind.__name__} is not known to update elementwise"):
        attach(model, kind(trainable(model)), CONFIG)


def test_an_optimizer_that_derives_from_a_known_one_is_accepted() -> None:
    model = adapted()
    attach(model, type("MyAdamW", (torch.optim.AdamW,), {})(trainable(model)), RefLoRAConfig(method="reflora-s"))


class Accumulating(torch.optim.AdamW):
    """Has the hooks called in its own step and, once a plain AdamW was made, again in AdamW's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("method", ["reflora", "reflora-s", "scaled-gd"])
def test_an_optimizer_with_a_step_of_its_own(method: str) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"Accumulating has a step\(\) of its own around AdamW's"):
        attach(model, Accumulating(trainable(model)), RefLoRAConfig(method=method))
    attach(model, Accumulating(trainable(model)), RefLoRAConfig(method="lora"))


def test_pefts_riemannian_optimizer() -> None:
    """It preconditions gradients by itself."""
    riemannian = pytest.importorskip("peft.optimizers.riemannian")
    model = adapted()
    optimizer = riemannian.create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
    with pytest.raises(ValueError, match="method='scaled-gd'"):
        attach(model, optimizer, CONFIG)


def test_a_namesake_of_adamw_is_not_adamw() -> None:
    """bitsandbytes' AdamW keeps other moments under the same name."""
    model = adapted()
    namesake = type("AdamW", (torch.optim.Optimizer,), {"__module__": "bitsandbytes.optim.adamw"})
    with pytest.raises(ValueError, match="rescales Adam's moments; AdamW is not one of"):
        attach(model, namesake(trainable(model), {}), RefLoRAConfig(method="reflora-s"))
    attach(model, namesake(trainable(model), {}), RefLoRAConfig(method="reflora"))


def test_another_adapter_activated_after_attach() -> None:
    """It would train as plain LoRA without a word."""
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    optimizer = torch.optim.AdamW((p for n, p in model.named_parameters() if "lora_" in n), lr=1e-3)
    attach(model, optimizer, CONFIG)
    model.set_adapter("other")
    model(torch.ones(3, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"active adapters changed after attach\(\)"):
        optimizer.step()


def test_reflora_s_needs_adam() -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"method='reflora-s' rescales Adam's moments; SGD is not one of Adam"):
        attach(model, torch.optim.SGD(trainable(model), lr=0.1), RefLoRAConfig(method="reflora-s"))


def test_attached_twice() -> None:
    model = adapted()
    optimizer = adamw(model)
    handle = attach(model, optimizer, CONFIG)
    with pytest.raises(RuntimeError, match=r"attached already: call detach\(\)"):
        attach(model, optimizer, CONFIG)
    handle.detach()
    attach(model, optimizer, CONFIG)


def test_given_to_peft_twice() -> None:
    model = adapted()
    twice = get_peft_model(copy.deepcopy(model.base_model.model), LoraConfig(r=2, target_modules=["first"]))
    inner = twice.base_model.model.first
    if type(inner.base_layer).__name__ == "Linear" and not hasattr(inner.base_layer, "lora_A"):
        inner.base_layer = copy.deepcopy(inner)  # PEFT refuses or flattens it today
    with pytest.raises(ValueError, match="LoRA layer inside a LoRA layer: the model was given to PEFT twice"):
        attach(twice, adamw(twice), CONFIG)


def test_tied_factors() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    layers = model.base_model.model
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    with pytest.raises(ValueError, match=r"adapters .*0\.default and .*1\.default share a factor"):
        attach(model, adamw(model), CONFIG)


def test_factors_that_peft_ties() -> None:
    """They are parameters of their own, on one memory."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with pytest.raises(ValueError, match=r"adapters .*embed_tokens\.default and .*lm_head\.default share a factor"):
        attach(model, adamw(model), CONFIG)


def test_factors_in_another_memory_format() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"])).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"0\.default\.lora_A has strides .*memory_format=torch\.contiguous_format"):
        attach(model, adamw(model), CONFIG)


def test_adalora() -> None:
    model = get_peft_model(Net(), AdaLoraConfig(r=2, target_modules=["first"], total_step=9))
    with pytest.raises(ValueError, match=r"is a SVDLinear, which is not supported; use peft\.LoraConfig"):
        attach(model, adamw(model), CONFIG)


def test_closure() -> None:
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, CONFIG)
    before = [p.clone() for p in trainable(model)]
    with pytest.raises(RuntimeError, match=r"optimizer.step\(closure\)"):
        optimizer.step(lambda: 0.0)
    assert all(torch.equal(p, q) for p, q in zip(before, trainable(model), strict=True))


def test_saved_state_of_another_method_or_version() -> None:
    model = adapted()
    handle = attach(model, adamw(model), CONFIG)
    state = handle.state_dict()
    with pytest.raises(ValueError, match="version=7"):
        handle.load_state_dict({**state, "version": 7})
    other = {**state, "config": {"method": "reflora-s"}}
    with pytest.raises(ValueError, match="written with method='reflora-s', this is 'reflora'"):
        handle.load_state_dict(other)
    handle.detach()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="written with method='reflora-s', this is 'reflora'"):
        attach(model, optimizer, CONFIG, state_dict=other)
    attach(model, optimizer, CONFIG, state_dict=state)  # nothing was left behind
