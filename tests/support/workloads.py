"""What the engines train in tests: the tiny LLaMA of the reference trajectories, and a synthetic one.

The reference holds what the published single-process implementations do: some cases of it ship with the tests, all of
them may lie in ``../shared/reference`` beside the repository or in ``REFLORA_REFERENCE``. The synthetic workload needs
no file and is compared with `train_single`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import LoRAMuon, LoRARite

Factors = dict[str, Tensor]
Attach = Callable[[Any, Any], Any]

# Correct runs land at 1e-6 to 1.2e-5: the order of fp32 summation differs with the number of ranks and Adam
# amplifies it where a gradient is nearly zero. The mildest wrong run is above 3e-4.
FACTOR_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5

TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY_LORA = {"r": 8, "lora_alpha": 16, "target_modules": list(LINEARS), "lora_dropout": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train: AdamW's hyperparameters, the clipping norm (0: off), micro-batches per optimizer step.

    ``rite`` are further hyperparameters of LoRARite, in place of AdamW, and ``muon`` of LoRAMuon; both None for AdamW.
    """

    lr: float = 5e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0
    grad_accum: int = 1
    rite: dict[str, Any] | None = None
    muon: dict[str, Any] | None = None

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Of parameters or groups of them."""
        kind, arguments = self.own_optimizer() or (torch.optim.AdamW, self.adamw())
        return kind(parameters, **arguments)

    def own_optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """Class and arguments of a method's optimizer; None for AdamW."""
        if self.muon is not None:
            return LoRAMuon, self.lora_muon()
        return None if self.rite is None else (LoRARite, self.lora_rite())

    def lora_muon(self) -> dict[str, Any]:
        """The keyword arguments of ``LoRAMuon``."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas, **(self.muon or {})}

    def lora_rite(self) -> dict[str, Any]:
        """The keyword arguments of ``LoRARite``."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas, **(self.rite or {})}

    def adamw(self) -> dict[str, Any]:
        """The keyword arguments of ``torch.optim.AdamW``."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}


def with_method(settings: Settings, method: str, **options: Any) -> Settings:
    """Settings under which the optimizer is the method's own, with these options, if it has one."""
    field = {"lora-rite": "rite", "lora-muon": "muon"}.get(method)
    return dataclasses.replace(settings, **{field: options}) if field else settings


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model recipe and its data. ``batches`` is ``[steps, global_batch, seq]``; labels are the inputs."""

    llama: dict[str, Any]
    lora: dict[str, Any]
    base_weights: Mapping[str, Tensor]
    initial_factors: Factors
    batches: Tensor
    settings: Settings


@dataclasses.dataclass(frozen=True)
class Reference(Workload):
    """The reference trajectories: per case its settings with every step's loss, and the final factors."""

    cases: dict[str, dict[str, Any]]
    factors: dict[str, Factors]

    def settings_of(self, name: str) -> Settings:
        """How a case trains: with AdamW, or as LoRA-RITE with its own defaults."""
        if self.cases[name]["method"] != "lora-rite":
            return dataclasses.replace(self.settings, clip=self.cases[name].get("clip", 0.0))
        return dataclasses.replace(self.settings, weight_decay=0.0, rite={})


def reference_dir() -> Path:
    """Where the reference trajectories lie: ``REFLORA_REFERENCE``, ``../shared/reference``, or those that ship."""
    if given := os.environ.get("REFLORA_REFERENCE"):
        return Path(given)
    beside = Path(__file__).resolve().parents[3] / "shared" / "reference"
    return beside if beside.is_dir() else Path(__file__).parent / "reference"


def reference_cases() -> dict[str, dict[str, Any]]:
    """The reference's cases for RefLoRA's methods."""
    return json.loads((reference_dir() / "meta.json").read_text())["cases"]


def load_reference() -> Reference:
    """Read the reference trajectories."""
    folder = reference_dir()
    meta = json.loads((folder / "meta.json").read_text())
    adamw = {**meta["adamw"], "betas": tuple(meta["adamw"]["betas"])}
    base_weights, initial_factors, batches = _drawn_start(meta) if "drawn" in meta else _stored_start(folder)
    start = Workload(meta["llama"], meta["lora"], base_weights, initial_factors, batches, Settings(**adamw))
    stored = {name: folder / f"factors_{name}.safetensors" for name in meta["cases"]}
    factors = {name: load_file(path) for name, path in stored.items() if path.is_file()}
    if "lora" not in factors:  # nobody's implementation but torch's
        _, factors["lora"] = train_single(build_model(start), start.batches, start.settings)
    return Reference(**vars(start), cases=meta["cases"], factors=factors)


def _stored_start(folder: Path) -> tuple[Factors, Factors, Tensor]:
    names = ("base_model", "factors_init", "batches")
    base_weights, factors, batches = (load_file(folder / f"{name}.safetensors") for name in names)
    return base_weights, factors, batches["input_ids"]


def _drawn_start(meta: dict[str, Any]) -> tuple[Factors, Factors, Tensor]:
    """The same base, factors and batches from torch's generator.

    Raises:
        ValueError: this release of torch or transformers draws other ones.
    """
    drawn = meta["drawn"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(drawn["base"]["seed"])
        base = LlamaForCausalLM(LlamaConfig(**meta["llama"], initializer_range=drawn["base"]["std"]))
    base_weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    generator = torch.Generator().manual_seed(drawn["factors"]["seed"])
    factors = {}
    for name, factor in named_factors(get_peft_model(base, LoraConfig(**meta["lora"]))).items():
        std = drawn["factors"]["std_a" if "lora_A" in name else "std_b"]
        factors[name] = std * torch.randn(factor.shape, generator=generator)
    generator = torch.Generator().manual_seed(drawn["batches"]["seed"])
    shape = (meta["steps"], meta["global_batch"], meta["seq"])
    batches = torch.randint(meta["llama"]["vocab_size"], shape, generator=generator)
    for part, tensors in (("base", base_weights), ("factors", factors), ("batches", {"input_ids": batches})):
        norm = torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm().item()
        if not math.isclose(norm, drawn[part]["norm"], rel_tol=1e-6):
            raise ValueError(
                f"{part} drawn from seed {drawn[part]['seed']} have norm {norm}, those of the reference "
                f"{drawn[part]['norm']}: install the versions of constraints.txt, or set REFLORA_REFERENCE"
            )
    return base_weights, factors, batches


def synthetic_workload(
    seed: int = 0,
    *,
    steps: int = 4,
    global_batch: int = 12,
    seq: int = 16,
    llama: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> Workload:
    """A random tiny LLaMA with LoRA (B is not zero) and random batches; ``llama``, ``lora`` override."""
    llama_settings, lora_settings = {**TINY_LLAMA, **(llama or {})}, {**TINY_LORA, **(lora or {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = LlamaForCausalLM(LlamaConfig(**llama_settings))
        base_weights = {name: weight.clone() for name, weight in base.state_dict().items()}
        model = get_peft_model(base, LoraConfig(**lora_settings))
        factors = {name: 0.2 * torch.randn(factor.shape) for name, factor in named_factors(model).items()}
        batches = torch.randint(llama_settings["vocab_size"], (steps, global_batch, seq))
    return Workload(llama_settings, lora_settings, base_weights, factors, batches, Settings())


def build_model(
    workload: Workload,
    *,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    initial_factors: Factors | None = None,
    **lora: Any,
) -> PeftModel:
    """The PEFT model of a workload before its first step.

    Args:
        workload: the recipe.
        dtype: of base and factors alike.
        gradient_checkpointing: Hugging Face's non-reentrant kind.
        initial_factors: instead of the workload's; an empty dictionary keeps PEFT's own start (B = 0, and A
            drawn from torch's generator).
        lora: overrides of ``LoraConfig`` fields (``r``, ``use_rslora``, ...).
    """
    base = LlamaForCausalLM(LlamaConfig(**workload.llama))
    base.load_state_dict(workload.base_weights)
    base.config.use_cache = False
    if gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(**{**workload.lora, **lora}))
    factors = workload.initial_factors if initial_factors is None else initial_factors
    if factors:
        load_factors(model, factors)
    model.train()
    return model.to(dtype)


def load_factors(model: PeftModel, factors: Factors) -> None:
    """Put values into every lora_A and lora_B."""
    parameters = named_factors(model)
    assert parameters.keys() == factors.keys(), parameters.keys() ^ factors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(factors[name])


def is_factor(name: str) -> bool:
    """Whether a parameter of this name is a lora_A or lora_B, or what LoRA-XS trains."""
    return any(f".lora_{kind}." in name for kind in ("A", "B", "embedding_A", "embedding_B", "xs_R"))


def named_factors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every lora_A and lora_B of a model by parameter name, whatever its wrappers."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if is_factor(name)}


def as_peft_names_them(factors: Factors) -> Factors:
    """Those that a model stores tall, under the name ``tall`` and transposed, as PEFT has them."""
    return {
        name.replace(".tall", ".weight"): factor.t() if name.endswith(".tall") else factor
        for name, factor in factors.items()
    }


def as_products(factors: Factors) -> Factors:
    """``B A`` of every pair in float64, by the name of its lora_A."""
    return {
        name: factors[name.replace("lora_A", "lora_B")].double() @ lora_a.double()
        for name, lora_a in factors.items()
        if "lora_A" in name
    }


def plain_name(name: str) -> str:
    """PEFT's name of a parameter, without what DDP, FSDP1 and activation checkpointing insert."""
    for inserted in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(inserted, "")
    return name.removeprefix("module.")


def train_single(
    model: torch.nn.Module,
    batches: Tensor,
    settings: Settings,
    attach: Attach | None = None,
    optimizer: Any = None,
) -> tuple[list[float], Factors]:
    """One process, the settings' optimizer unless one is given. Returns losses and final factors."""
    if optimizer is None:
        optimizer = settings.optimizer([p for p in model.parameters() if p.requires_grad])
    if attach is not None:
        attach(model, optimizer)
    losses = []
    for batch in batches:
        micro_losses = []
        for micro_batch in batch.chunk(settings.grad_accum):
            loss = model(input_ids=micro_batch, labels=micro_batch).loss
            (loss / settings.grad_accum).backward()
            micro_losses.append(loss.item())
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(micro_losses) / len(micro_losses))
    return losses, as_peft_names_them({name: f.detach().clone() for name, f in named_factors(model).items()})


def worst_factor_error(factors: Factors, expected: Factors) -> float:
    """The largest ||x - ref|| / ||ref|| (Frobenius) over all factors; names and shapes must be the same."""
    assert factors.keys() == expected.keys(), factors.keys() ^ expected.keys()
    for name, reference in expected.items():
        assert factors[name].shape == reference.shape, (name, factors[name].shape, reference.shape)
    errors = [((factors[name].to(ref.dtype) - ref).norm() / ref.norm()).item() for name, ref in expected.items()]
    assert all(map(math.isfinite, errors)), "NaN or inf in a factor"  # max() may pass over NaN
    return max(errors)


def worst_loss_error(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference of two sequences of losses."""
    errors = [abs(loss - ref) / abs(ref) for loss, ref in zip(losses, expected, strict=True)]
    assert all(map(math.isfinite, errors)), "NaN or inf in a loss"
    return max(errors)
