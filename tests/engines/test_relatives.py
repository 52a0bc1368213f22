"""PEFT's variants, starts and optimizers beside a method: what goes together, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    ArrowConfig,
    EvaConfig,
    LoraConfig,
    PeftModel,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from reflora_dist import RefLoRAConfig, attach, tall_adapters
from reflora_dist.checkpoints.training_state import save_adapter
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.methods.reference import refactored
from tests.support.adapters import variant_base
from tests.support.cluster import run_ranks
from tests.support.small import trainable
from tests.support.workloads import synthetic_workload

CONFIG = RefLoRAConfig(warmup_steps=0)
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
TOGETHER: dict[str, dict[str, Any]] = {
    "plain": {},
    "velora": {"velora_config": {"num_groups": 8}},
    "alora": {"alora_invocation_tokens": [5, 7]},
    "pissa": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "flat-lora": {},
}
_NOISE = {"flat-lora": 0.1}
_ON_GPUS = ("loftq",)  # PEFT computes this start on "cuda", whatever the model is on
_BLOCKS = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down_proj"], "nblocks": 2}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kasa": ({"kasa_config": {}}, "uses KasaLinearVariant, which is not supported"),
    "bdlora": (
        {"use_bdlora": _BLOCKS},
        "not supported",
    ),
    "monteclora": ({"monteclora_config": {}}, "uses MontecloraLinearVariant, which is not supported"),
    "mica": ({"init_lora_weights": "mica"}, "uses MiCALinearVariant, which is not supported"),
}


def _batches(steps: int) -> Tensor:
    batches = synthetic_workload(steps=steps).batches.clone()
    batches[:, :, 2:4] = torch.tensor([5, 7])  # what switches aLoRA on
    return batches


def _model(name: str) -> PeftModel:
    torch.manual_seed(0)
    base, config = variant_base(), LoraConfig(**{**LORA, **TOGETHER[name]})
    if name == "corda":
        rows = _batches(2).flatten(0, 1).unsqueeze(1)  # it reads one sequence at a time
        preprocess_corda(base, config, run_model=lambda: [base(row) for row in rows])  # type: ignore[arg-type]
    model: Any = get_peft_model(base, config)
    if name == "eva":
        rows = [{"input_ids": row} for row in _batches(2)[0].unbind()]
        loader = torch.utils.data.DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
        initialize_lora_eva_weights(model, loader)
    with torch.no_grad():
        for pair in find_pairs(model):
            if not pair.lora_b.any():
                pair.lora_b.normal_(std=0.2)
    return model.train()


def _backward(model: nn.Module, batch: Tensor, noise: float = 0.0) -> None:
    """As Flat-LoRA does, the base is disturbed by ``noise`` while gradients are made, and put back."""
    base = [parameter for name, parameter in model.named_parameters() if "base_layer" in name]
    before = [weight.detach().clone() for weight in base]
    with torch.no_grad():
        for index, weight in enumerate(base):
            weight.mul_(1 + noise * (-1) ** index)
    model(input_ids=batch, labels=batch).loss.backward()
    with torch.no_grad():
        for weight, old in zip(base, before, strict=True):
            weight.copy_(old)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.gpu] * (n in _ON_GPUS)) for n in TOGETHER])
def test_the_variants_gradients_are_refactored(name: str) -> None:
    """Whatever gradients a variant makes: these are what S multiplies."""
    model = _model(name)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    attach(model, optimizer, CONFIG)
    _backward(model, _batches(1)[0], _NOISE.get(name, 0.0))
    pairs = find_pairs(model)
    before = [tuple(f.detach().double() for f in (p.lora_a, p.lora_b, p.lora_a.grad, p.lora_b.grad)) for p in pairs]  # type: ignore[union-attr]
    optimizer.step()
    for pair, tensors in zip(pairs, before, strict=True):
        for factor, expected in zip((pair.lora_a, pair.lora_b), refactored(*tensors), strict=True):
            assert factor.grad is not None and factor.grad.any()
            torch.testing.assert_close(factor.grad.double(), expected, rtol=1e-4, atol=1e-7)


def _load(model: PeftModel, factors: dict[str, Tensor]) -> PeftModel:
    set_peft_model_state_dict(model, factors)
    return model


def _train(model: Any, folder: Path, name: str = "plain") -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    attach(model, optimizer, CONFIG)
    for batch in _batches(3):
        _backward(model, batch, _NOISE.get(name, 0.0))
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, folder)


def _sharded(rank: int, world_size: int, name: str, factors: dict[str, Tensor], folder: Path) -> None:
    model = _load(_model(name), factors)
    tall_adapters(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    _train(model, folder, name)


@pytest.mark.parametrize(
    "name",
    ["alora", "flat-lora", *(pytest.param(n, marks=pytest.mark.all_ranks) for n in ("velora", "eva", "corda"))],
)
def test_shards_follow_one_process(name: str, tmp_path: Path) -> None:
    start = {key: factor.clone() for key, factor in get_peft_model_state_dict(_model(name)).items()}
    run_ranks(_sharded, 2, name, start, tmp_path / "sharded")
    _train(_load(_model(name), start), tmp_path / "whole", name)
    whole, sharded = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("whole", "sharded"))
    for key, factor in whole.items():
        torch.testing.assert_close(sharded[key], factor, rtol=1e-3, atol=1e-5)


def _boost(folder: Path, shard: bool) -> tuple[Tensor, Tensor]:
    """Return a weight before and after XGBLoRA's rounds: an adapter of r = 1 is trained and merged, then the next."""
    torch.manual_seed(0)
    base = start = variant_base()
    for part in ("first", "second"):
        config = LoraConfig(**{**LORA, "r": 1}, init_lora_weights=False)
        model: Any = get_peft_model(copy.deepcopy(base), config)
        tall_adapters(model)
        if shard:
            fully_shard(model)
        _train(model, folder / part)
        # a sharded base cannot be merged: the saved adapter is merged into the whole one
        base = PeftModel.from_pretrained(copy.deepcopy(base), str(folder / part)).merge_and_unload()
    before, after = (model.model.layers[0].self_attn.q_proj.weight.detach() for model in (start, base))
    return before, after


def _boosted(rank: int, world_size: int, folder: Path) -> None:
    torch.save(_boost(folder, shard=True)[1], folder / f"{rank}.pt")


def test_rank_one_adapters_are_merged_and_attached_anew(tmp_path: Path) -> None:
    """XGBLoRA's rounds, in one process and sharded."""
    run_ranks(_boosted, 2, tmp_path)
    start, whole = _boost(tmp_path / "whole", shard=False)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), whole, rtol=1e-3, atol=1e-5)
    assert not torch.equal(whole, start)


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_that_is_no_product_of_two_factors_is_refused(name: str) -> None:
    settings, message = REFUSED[name]
    model = get_peft_model(variant_base(), LoraConfig(**{**LORA, **settings}))
    with pytest.raises(ValueError, match=message):
        attach(model, torch.optim.SGD(trainable(model), lr=1e-2), CONFIG)


def test_qalora_is_refused() -> None:
    """PEFT uses it on GPTQ layers alone, where it pools the inputs of lora_A, ``[r, in / group]``."""
    config = LoraConfig(**LORA, use_qalora=True, qalora_group_size=4)
    model = get_peft_model(variant_base(), config)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_variant["default"] = QALoraLinearVariant()
    QALoraLinearVariant.init(layer, "default", config)
    with pytest.raises(ValueError, match="uses QALoraLinearVariant, which is not supported"):
        attach(model, torch.optim.SGD(trainable(model), lr=1e-2), CONFIG)


def test_arrow_is_refused(tmp_path: Path) -> None:
    """Its router adds adapters that were trained before; its own factors take no part."""
    for part in ("a", "b"):
        get_peft_model(variant_base(), LoraConfig(**LORA)).save_pretrained(tmp_path / part)
    model = create_arrow_model(variant_base(), [str(tmp_path / part) for part in ("a", "b")], ArrowConfig(top_k=1))
    with pytest.raises(ValueError, match="uses ArrowLinearVariant, which is not supported"):
        attach(model, torch.optim.SGD(model.parameters(), lr=1e-2), CONFIG)


def test_adalora_is_refused() -> None:
    model = get_peft_model(
        variant_base(), AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"which is not supported; use peft\.LoraConfig"):
        attach(model, torch.optim.SGD(trainable(model), lr=1e-2), CONFIG)


def test_loraplus_has_its_own_rate_for_lora_b() -> None:
    model = _model("plain")
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    handle = attach(model, optimizer, CONFIG)
    _backward(model, _batches(1)[0])
    optimizer.step()
    assert handle.report().applied_steps == 1 and {group["lr"] for group in optimizer.param_groups} >= {1e-3, 16e-3}


def _refused_optimizers() -> Iterator[Any]:
    lorafa: Callable[[Any], Any] = lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)  # noqa: E731
    riemannian: Callable[[Any], Any] = lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)  # noqa: E731
    yield pytest.param(lorafa, "lora_A of .* is frozen", id="lora-fa")
    yield pytest.param(riemannian, r"method='scaled-gd' replaces PEFT's create_riemannian_optimizer", id="riemannian")


@pytest.mark.parametrize(("make", "message"), _refused_optimizers())
def test_an_optimizer_of_peft_is_refused(make: Callable[[Any], Any], message: str) -> None:
    model = _model("plain")
    optimizer = make(model)
    with pytest.raises(ValueError, match=message):
        attach(model, optimizer, CONFIG)
