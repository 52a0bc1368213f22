"""Adapters on a base of 4-bit weights (bitsandbytes, on its CPU backend): what is trained are the factors, as ever."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import peft.tuners.lora.bnb
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor

from launchers.finetune import load_model
from launchers.training.options import parse_options
from reflora_dist import RefLoRACallback, RefLoRAConfig, attach, initialize_adapters
from reflora_dist.checkpoints.adapter_files import save_adapter
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.lora_sb import LoraXSConfig
from reflora_dist.methods.reference import ReferenceRefLoRA
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.four_bit import quantized_base, quantized_model, save_base
from tests.support.oracles import train_oracle
from tests.support.workloads import (
    FACTOR_TOLERANCE,
    LOSS_TOLERANCE,
    Factors,
    Settings,
    Workload,
    build_model,
    named_factors,
    synthetic_workload,
    train_single,
    with_method,
    worst_factor_error,
    worst_loss_error,
)

METHODS = ("reflora", "reflora-s", "scaled-gd", "lora-pro", "lora-rite", "lora-muon")
SMALLEST_DIFFERENCE = 1e-3  # between runs that must not agree; FACTOR_TOLERANCE is 1e-4


def _config(method: str) -> RefLoRAConfig:
    return RefLoRAConfig(method=method, warmup_steps=0 if method in METHOD_OPTIMIZERS else 1)


def _settings(workload: Workload, method: str) -> Settings:
    settings = dataclasses.replace(workload.settings, clip=0.5)
    if method == "lora-muon":  # its rate is the norm of the product's step, and moves the factors by less
        settings = dataclasses.replace(settings, lr=4 * settings.lr)
    return with_method(settings, method)


class Outcome(NamedTuple):
    losses: list[float]
    factors: Factors
    base_fraction: float  # of the packed weights, that this rank held


def _train(rank: int, world_size: int, engine_name: str, folder: Path) -> dict[str, Outcome]:
    workload, engine = synthetic_workload(), ENGINES[engine_name]
    outcomes = {}
    for method in METHODS:
        models: list[Any] = []

        def attach_to(model: Any, optimizer: Any, of: str = method, to: list[Any] = models) -> None:
            attach(model, optimizer, _config(of))
            to.append(model)

        callback = _Keeping(_config(method), models)
        losses, factors = engine.train(
            quantized_model(workload, folder),
            workload.batches,
            _settings(workload, method),
            callback if engine.takes_callback else attach_to,
        )
        outcomes[method] = Outcome(losses, factors, _base_fraction(models[0]))
        if method == "reflora":
            save_adapter(models[0], folder / "adapter")
    return outcomes


class _Keeping(RefLoRACallback):
    """Keeps the model that Trainer trains."""

    def __init__(self, config: RefLoRAConfig, models: list[Any]) -> None:
        super().__init__(config)
        self.models = models

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self.models.append(kwargs["model"])


def _base_fraction(model: Any) -> float:
    """Elements of packed weights on this rank, of all. Every adapted weight must be packed."""
    held, whole = 0, 0
    for pair in find_pairs(model):
        assert isinstance(pair.layer, peft.tuners.lora.bnb.Linear4bit)
        layer: Any = pair.layer.get_base_layer()
        weight = layer.weight
        assert layer.quant_state is not None
        whole += pair.in_features * pair.out_features // 8  # of 4 bits, in elements of float32
        local = weight.to_local() if isinstance(weight.data, DTensor) else weight
        held += getattr(weight, "ds_tensor", local).numel()
    return held / whole


@functools.cache
def _expected(method: str, folder: Path | None) -> tuple[list[float], Factors]:
    """One process, the plain method: on the quantized base, or with None on the base itself."""
    workload = synthetic_workload()
    model = build_model(workload) if folder is None else quantized_model(workload, folder)
    settings, config = _settings(workload, method), _config(method)
    if method != "reflora-s":
        return train_oracle(model, workload.batches, settings, config)
    values = list(named_factors(model).values())
    pairs = list(zip(values[0::2], values[1::2], strict=True))
    return train_single(model, workload.batches, settings, lambda _, o: ReferenceRefLoRA(pairs, o, config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(synthetic_workload(), folder)
    return folder


@pytest.mark.parametrize(
    "engine_name",
    [
        "fsdp2",
        *(
            pytest.param(f"{engine}{suffix}", marks=pytest.mark.all_ranks)
            for engine in ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
            for suffix in ("-full" if engine == "fsdp1" else "", "-trainer")
            if f"{engine}{suffix}" != "fsdp2"
        ),
    ],
)
def test_training_on_a_quantized_base_follows_the_plain_methods(engine_name: str, folder: Path) -> None:
    """Factors and losses of every method are those of one process with the same 4-bit base, and not those with the
    base that it was made of. The saved adapter is loaded by PEFT onto the 4-bit base.
    """
    for outcomes in run_ranks(_train, 2, engine_name, folder):
        for method, outcome in outcomes.items():
            losses, factors = _expected(method, folder)
            assert worst_factor_error(outcome.factors, factors) < FACTOR_TOLERANCE, method
            assert worst_loss_error(outcome.losses, losses) < LOSS_TOLERANCE, method
            assert worst_factor_error(outcome.factors, _expected(method, None)[1]) > SMALLEST_DIFFERENCE, method
            sharded = engine_name.startswith(("fsdp", "zero3"))
            assert outcome.base_fraction == pytest.approx(0.5 if sharded else 1.0, rel=0.05)
    loaded = PeftModel.from_pretrained(quantized_base(folder), folder / "adapter", is_trainable=True)
    assert worst_factor_error(named_factors(loaded), outcomes["reflora"].factors) == 0.0


def _sft(rank: int, world_size: int, engine_name: str, folder: Path) -> dict[str, tuple[Factors, dict[str, Any]]]:
    workload, found = synthetic_workload(), {}
    # before the first of them makes transformers load in ZeRO-3's way
    models = {method: quantized_model(workload, folder) for method in ("lora", "reflora")}
    for method, model in models.items():
        callback = RefLoRACallback(RefLoRAConfig(method=method, warmup_steps=1))
        settings = _settings(workload, method)
        factors = ENGINES[engine_name].train(model, workload.batches, settings, callback)[1]
        found[method] = factors, callback.report().as_dict()
    return found


@pytest.mark.parametrize("engine_name", ["fsdp2-sft", pytest.param("zero3-sft", marks=pytest.mark.all_ranks)])
def test_sft_trainer_on_a_quantized_base(engine_name: str, folder: Path) -> None:
    """It casts the factors to bf16, whose rounding is as large as what the method changes. So the change is held by
    its direction.
    """
    expected = _difference(*(_expected(method, folder)[1] for method in ("reflora", "lora")))
    for found in run_ranks(_sft, 2, engine_name, folder):
        report = found["reflora"][1]
        assert (report["layout"], report["applied_steps"]) == ("tall", len(synthetic_workload().batches) - 1)
        assert report["skipped_pairs"] == 0
        changed = _difference(found["reflora"][0], found["lora"][0])
        assert torch.nn.functional.cosine_similarity(changed, expected, dim=0) > 0.7


def _difference(one: Factors, other: Factors) -> torch.Tensor:
    return torch.cat([(one[name].float() - other[name].float()).flatten() for name in sorted(one)])


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ([], torch.float32),
        (["--bf16=True"], torch.bfloat16),
        (["--model_dtype=bfloat16"], torch.bfloat16),
        (["--model_dtype=float32", "--bf16=True"], torch.bfloat16),
    ],
)
def test_finetune_loads_a_4_bit_base(changes: list[str], dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """As QLoRA: every linear layer but the head; stored in the dtype to which an engine may cast parameters."""
    options = parse_options(["--load_in_4bit=True", f"--output_dir={tmp_path}", *changes])
    layers = {n: m for n, m in load_model(str(folder), options).named_modules() if isinstance(m, torch.nn.Linear)}
    assert not hasattr(layers.pop("lm_head").weight, "quant_state") and len(layers) == 14
    for layer in layers.values():
        weight: Any = layer.weight
        assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
        assert weight.dtype == layer.compute_dtype == dtype


@pytest.mark.parametrize("init", ["pissa", "olora", "kaiming_both"])
def test_a_start_that_changes_a_quantized_base_is_refused(init: str, folder: Path) -> None:
    """Whatever dtype its packed weights are stored as."""
    model = quantized_model(synthetic_workload(), folder)
    with pytest.raises(ValueError, match=r"q_proj.default is quantized \(Params4bit.*load the base in bfloat16"):
        initialize_adapters(model, init)


def test_lora_sb_and_lora_xs_refuse_a_quantized_base(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"q_proj is quantized \(Linear4bit.*load the base in bf16 or fp32"):
        get_peft_model(quantized_base(folder), LoraXSConfig(r=4, target_modules=["q_proj"]))


def test_evaluations_leave_the_gradients_alone(tmp_path: Path) -> None:
    """bitsandbytes does not by itself, on a CPU with AVX512-BF16: see ``keep_weight_layout``."""
    workload = synthetic_workload(llama={"intermediate_size": 256, "num_key_value_heads": 4})  # sizes that it lays out
    save_base(workload, tmp_path)
    model, batch = quantized_model(workload, tmp_path), workload.batches[0]

    def gradients() -> Factors:
        model.train().zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        return {name: factor.grad.clone() for name, factor in named_factors(model).items() if factor.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=batch)
    assert worst_factor_error(gradients(), before) == 0.0
