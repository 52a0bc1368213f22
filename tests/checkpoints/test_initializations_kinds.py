"""The change of the base by itself, the factors of every start, every kind of layer, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from reflora_dist import export_adapter, initialize_adapters, replay_initialization
from reflora_dist.checkpoints.training_state import save_adapter
from reflora_dist.starts.base_change import Block, blocks_of_flat_piece, checksum, subtract_product
from reflora_dist.starts.convert import exact_pattern
from tests.support.initializations import WORKLOAD, base_model, leave_gradients

# --- the change of a weight ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_cut_of_a_weight_is_changed_to_the_same_bits(dtype: torch.dtype) -> None:
    """Flat pieces that cut rows, single elements, rows and columns: bit for bit the whole's, and the exact product
    rounded once; checksums of the pieces add up to the whole's.
    """
    rows, columns, rank, scaling = 7, 13, 5, 0.3
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    whole = weight.clone()
    subtract_product(Block(whole, 0, 0), left, right, scaling)
    exact = (weight.double() - scaling * (left.double() @ right.double())).to(dtype)
    torch.testing.assert_close(whole, exact, rtol=torch.finfo(dtype).eps, atol=1e-12)
    for length in (1, 4, 13, 17, 30, 90, 91):
        pieces = weight.clone().view(-1).split(length)
        total = 0
        for index, piece in enumerate(pieces):
            for block in blocks_of_flat_piece(piece, index * length, columns):
                subtract_product(block, left, right, scaling)
                total += checksum(block)
        assert torch.equal(torch.cat(pieces).view(rows, columns), whole)
        assert total % 2**64 == checksum(Block(whole, 0, 0))
    by_columns = weight.clone()
    for column in range(0, columns, 4):
        subtract_product(Block(by_columns[:, column : column + 4], 0, column), left, right, scaling)
    assert torch.equal(by_columns, whole)


def test_a_checksum_sees_values_and_places() -> None:
    weight = torch.arange(12.0).view(3, 4)
    values = {checksum(Block(w, 0, 0)) for w in (weight, weight.flip(0), weight.flip(1), weight + 1e-6, weight.T)}
    assert len(values) == 5


# --- the factors ---


def test_kaiming_both_draws_the_published_numbers() -> None:
    """After the same seed and PEFT's own start: Kaiming-uniform with a = sqrt(5) from torch's generator, A before B,
    layer by layer; A within 1 / sqrt(in), B within 1 / sqrt(r).
    """
    torch.manual_seed(3)
    published: Any = get_peft_model(base_model(), LoraConfig(**WORKLOAD.lora))
    module: Any
    for module in published.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            for factor in (module.lora_A["default"].weight, module.lora_B["default"].weight):
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    torch.manual_seed(3)
    model = get_peft_model(base_model(), LoraConfig(**WORKLOAD.lora))
    initialize_adapters(model, "kaiming_both")
    expected = dict(published.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, expected[name])
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.9 * bound < parameter.abs().max() <= bound


def _exact_svd(matrix: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """In place of a random decomposition, so that two of the same matrix agree."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].T


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_are_those_that_peft_computes(init: str, rslora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a model that PEFT itself started: the same B A, and the same base weights up to rounding."""
    more: dict[str, Any] = {"use_rslora": rslora}
    own: dict[str, Any] = {"init_lora_weights": init}
    ga = LoraGAConfig() if init == "lora_ga" else None
    monkeypatch.setattr(torch, "svd_lowrank", _exact_svd)
    base: Any = base_model()
    if ga is not None:
        twin: Any = base_model()
        twin(input_ids=WORKLOAD.batches[0], labels=WORKLOAD.batches[0]).loss.backward()
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear):
                module._peft_loraga_grad = twin.get_submodule(name).weight.grad
    torch.manual_seed(0)
    peft_own = get_peft_model(base, LoraConfig(**{**WORKLOAD.lora, **more, **own}, lora_ga_config=ga))
    torch.manual_seed(0)
    model = get_peft_model(base_model(), LoraConfig(**WORKLOAD.lora, **more))
    if ga is not None:
        leave_gradients(model)
    initialize_adapters(model, init, lora_ga_config=ga)
    expected = dict(peft_own.named_parameters())
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            # singular vectors have a sign, their product has none
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-5)


# --- kinds of layers ---


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 6)
        self.conv1 = nn.Conv1d(6, 12, 3)
        self.conv2 = nn.Conv2d(1, 9, 3)
        self.head = nn.Linear(9, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.conv1(self.embed(input_ids).transpose(1, 2))
        return self.head(self.conv2(hidden[:, None]).mean((2, 3)))


class _SameLastNames(nn.Module):
    """The first module's path is the end of the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 6)
        self.l = nn.Linear(6, 8)
        self.enc, self.dec = nn.ModuleDict({"l": nn.Linear(8, 8)}), nn.ModuleDict({"l": nn.Linear(8, 8)})

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.dec["l"](self.enc["l"](self.l(self.embed(input_ids))))


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=ids)
    return (output if isinstance(output, Tensor) else output.logits).clone()


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))


_KINDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "convolutions": (_Convolutions, {"target_modules": ["embed", "conv1", "conv2", "head"]}, "kaiming_both"),
    "gpt2-kaiming": (_gpt2, {"target_modules": ["c_attn", "c_proj"]}, "kaiming_both"),
    "gpt2-pissa": (_gpt2, {"target_modules": ["c_attn", "c_proj"]}, "pissa"),
    "gpt2-olora": (_gpt2, {"target_modules": ["c_attn", "c_proj"]}, "olora"),
    "rslora": (base_model, {"target_modules": ["q_proj"], "use_rslora": True}, "pissa"),
    "patterns": (
        base_model,
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"o_proj": 3},
            "alpha_pattern": {"layers.1.*.q_proj": 5},
            "use_rslora": True,
        },
        "kaiming_both",
    ),
    "alpha-of-a-last-name": (_SameLastNames, {"target_modules": ["l"], "alpha_pattern": {"^l": 64}}, "kaiming_both"),
    "r-of-a-last-name": (_SameLastNames, {"target_modules": ["l"], "rank_pattern": {"^l": 2}}, "kaiming_both"),
    "dora": (base_model, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}, "kaiming_both"),
    "modules-to-save": (base_model, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "olora"),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_kinds_of_layers_and_adapters(kind: str, tmp_path: Path) -> None:
    """The function stays at the start; after the factors moved, a replay and plain PEFT on the converted adapter
    both compute the moved function from the original base.
    """
    make, lora, init = _KINDS[kind]
    config = {"r": 4, "lora_alpha": 6, **lora}
    torch.manual_seed(0)
    weights = make().state_dict()

    def base() -> Any:
        model = make()
        model.load_state_dict(weights)
        return model

    ids = torch.randint(32, (2, 12))
    expected = _logits(base(), ids)
    model = get_peft_model(base(), LoraConfig(**config))
    initialize_adapters(model, init)
    torch.testing.assert_close(_logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    moved = _logits(model, ids)
    assert (moved - expected).abs().max() > 1e-3
    save_adapter(model, tmp_path / "trained")
    export_adapter(model, tmp_path / "ordinary")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "ordinary")
    torch.testing.assert_close(_logits(loaded, ids), moved, rtol=1e-4, atol=2e-5)
    replayed = get_peft_model(base(), LoraConfig(**config))
    replay_initialization(replayed, tmp_path / "trained")
    replayed.load_adapter(tmp_path / "trained", "default")
    assert torch.equal(_logits(replayed, ids), moved)


def test_a_pattern_matches_its_module_only() -> None:
    """Or, where a name that looks like a key stands in the way, it is refused."""
    assert exact_pattern({"l": 2, "enc.l": 4, "dec.l": 4}, 4) == {"^l": 2}
    with pytest.raises(ValueError, match=r"cannot give the module '\^l' its 4"):
        exact_pattern({"l": 2, "^l": 4}, 4)


# --- refusals ---
