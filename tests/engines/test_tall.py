"""lora_A stored tall: PEFT's own uses give PEFT's own results, files are PEFT's, what cannot be converted is left."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

from reflora_dist import RefLoRACallback, RefLoRAConfig, attach, initialize_adapters, tall_adapters
from reflora_dist.checkpoints.training_state import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.engines.tall import TallLinear, in_peft_form
from tests.support.small import SmallNet, backward, small_batches, small_model, train_small, trainable
from tests.support.workloads import as_peft_names_them, worst_factor_error

CONFIG = RefLoRAConfig(warmup_steps=0)
# a product of float64 whose sums are taken in another order
ROUNDING: dict[str, float] = {"rtol": 1e-12, "atol": 1e-13}
_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rank_pattern": {"rank_pattern": {"first": 2}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def both(**settings: Any) -> tuple[PeftModel, PeftModel]:
    """A model as PEFT makes it, and its copy with lora_A stored tall."""
    flat, tall = small_model(**settings), small_model(**settings)
    assert tall_adapters(tall) == 2
    return flat, tall


def test_conversion_is_counted_and_done_once() -> None:
    model = small_model()
    assert tall_adapters(model) == 2
    assert tall_adapters(model) == 0
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if ".lora_A." in name}
    assert sorted(shapes.values()) == [(10, 3), (14, 3)]
    assert all(name.endswith(".tall") for name in shapes)
    assert all(p.is_contiguous() for p in trainable(model))


@pytest.mark.parametrize("variant", _VARIANTS)
def test_forward_and_gradients_are_pefts(variant: str) -> None:
    flat, tall = both(**_VARIANTS[variant])
    batch = small_batches(1)[0]
    for model in (flat, tall):
        torch.manual_seed(0)  # of the dropout
        backward(model, batch)
    torch.testing.assert_close(tall(batch), flat(batch), **ROUNDING) if variant != "dropout" else None
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (flat, tall)]
    found = as_peft_names_them(gradients[1])
    assert found.keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(found[name], gradient, **ROUNDING)


@pytest.mark.parametrize("variant", _VARIANTS)
def test_merging_is_pefts_bit_by_bit(variant: str) -> None:
    flat, tall = both(**_VARIANTS[variant])
    before = {name: p.detach().clone() for name, p in tall.named_parameters()}
    for model in (flat, tall):
        model.merge_adapter()
    merged = [model.base_model.model.first.base_layer.weight for model in (flat, tall)]
    assert torch.equal(*merged)
    tall.unmerge_adapter()
    flat.unmerge_adapter()
    for name, parameter in tall.named_parameters():
        torch.testing.assert_close(parameter, before[name], **ROUNDING)
    unloaded = [dict(model.merge_and_unload().named_parameters()) for model in (flat, tall)]
    assert unloaded[0].keys() == unloaded[1].keys()
    assert all(torch.equal(unloaded[1][name], weight) for name, weight in unloaded[0].items())


def test_state_dictionaries_are_pefts() -> None:
    flat, tall = both()
    ours, pefts = tall.state_dict(), flat.state_dict()
    assert list(ours) == list(pefts)
    assert all(torch.equal(ours[name], value) for name, value in pefts.items())
    changed = {name: value + 1 if "lora_A" in name else value for name, value in pefts.items()}
    tall.load_state_dict(changed)
    assert all(torch.equal(value, changed[name]) for name, value in tall.state_dict().items())
    for assign in (False, True):
        tall.load_state_dict(pefts, assign=assign)
        assert all(torch.equal(value, pefts[name]) for name, value in tall.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        tall.load_state_dict({name: v[:2] if "lora_A" in name else v for name, v in pefts.items()})
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_A"):
        tall.load_state_dict({name: v for name, v in pefts.items() if "lora_A" not in name})
    assert in_peft_form(dict(tall.named_parameters())).keys() == dict(flat.named_parameters()).keys()


def test_saved_adapters_are_pefts_byte_by_byte(tmp_path: Path) -> None:
    """By PEFT, by PEFT with a state dictionary of parameters' names, and by this package; and they load both ways."""
    flat, tall = both()
    flat.save_pretrained(tmp_path / "peft")
    tall.save_pretrained(tmp_path / "tall")
    tall.save_pretrained(tmp_path / "gathered", state_dict=dict(tall.named_parameters()))
    save_adapter(tall, tmp_path / "ours")
    expected = (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
    for folder in ("tall", "gathered", "ours"):
        assert (tmp_path / folder / "adapter_model.safetensors").read_bytes() == expected, folder
        config = (tmp_path / folder / "adapter_config.json").read_bytes()
        assert config == (tmp_path / "peft" / "adapter_config.json").read_bytes(), folder
    for loaded in both(seed=5):
        load_adapter(loaded, adamw(loaded), tmp_path / "ours")
        assert worst_factor_error(_factors(loaded), _factors(flat)) == 0.0


def _factors(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    return as_peft_names_them(found)


def test_copies_and_pickles_stay_tall() -> None:
    _, tall = both()
    batch = small_batches(1)[0]
    for other in (copy.deepcopy(tall), pickle.loads(pickle.dumps(tall))):
        assert torch.equal(other(batch), tall(batch))
        assert all(pair.stored_tall for pair in find_pairs(other))
        assert list(other.state_dict()) == list(tall.state_dict())
    assert not any(pair.lora_a is again.lora_a for pair, again in zip(find_pairs(tall), find_pairs(other), strict=True))


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    """And not the model that it was copied from."""
    _, tall = both()
    other = copy.deepcopy(tall)
    with torch.no_grad():
        find_pairs(other)[0].lora_b.add_(1)
    for name, model in (("tall", tall), ("other", other)):
        model.save_pretrained(tmp_path / name, state_dict=dict(model.named_parameters()))
    contents = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("tall", "other")]
    assert contents[0] != contents[1]


def test_weighted_adapters_are_pefts() -> None:
    models = both()
    for model in models:
        torch.manual_seed(0)
        model.add_adapter("other", LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"]))
        model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "mixed", combination_type="linear")
        model.set_adapter("mixed")
    batch = small_batches(1)[0]
    torch.testing.assert_close(models[1](batch), models[0](batch), **ROUNDING)


def test_autocast_and_compile() -> None:
    _, tall = both(dtype=torch.float32)
    batch = small_batches(1)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert tall(batch).dtype == torch.bfloat16
    compiled = torch.compile(tall, backend="eager")
    torch.testing.assert_close(compiled(batch), tall(batch))


@pytest.mark.parametrize("method", ["reflora", "reflora-s", "balora", "scaled-gd", "lora-pro"])
def test_training_is_that_of_flat_adapters(method: str) -> None:
    flat, tall = both()
    ends = []
    for model in (flat, tall):
        optimizer = adamw(model)
        attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=0))
        ends.append(train_small(model, optimizer, small_batches(4)))
    assert worst_factor_error(as_peft_names_them(ends[1]), ends[0]) < 1e-9


# --- what stays as it is ---


class Mixed(nn.Module):
    """An embedding, a convolution, linears, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.linear, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).mT).mT
        return self.frozen(self.linear(x)).mean()


def mixed_model() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed", "conv", "linear", "frozen"], init_lora_weights=False)
    return get_peft_model(Mixed(), config).double()


def test_what_is_no_trained_linear_stays() -> None:
    """And both kinds of storage train together, to the same end."""
    flat, model = mixed_model(), mixed_model()
    model.base_model.model.frozen.lora_A["default"].requires_grad_(False)
    assert tall_adapters(model) == 1
    tall = {pair.name.split(".")[-2] for pair in find_pairs(model) if pair.stored_tall}
    assert tall == {"linear"}
    model.base_model.model.frozen.lora_A["default"].requires_grad_(True)
    ends = []
    for trained in (flat, model):
        optimizer = torch.optim.SGD(trainable(trained), lr=0.1)
        handle = attach(trained, optimizer, CONFIG)
        for seed in range(3):
            tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
            trained(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle.report().applied_steps == 3
        ends.append({n: p.detach() for n, p in trained.named_parameters() if p.requires_grad})
    assert worst_factor_error(as_peft_names_them(ends[1]), ends[0]) < 1e-9


def test_tied_factors_stay() -> None:
    model = get_peft_model(SmallNet(), LoraConfig(r=3, target_modules=["first", "second"]))
    first, second = (model.base_model.model.get_submodule(name) for name in ("first", "second"))
    second.lora_A["default"] = nn.Linear(14, 3, bias=False)
    second.lora_A["default"].weight.data = first.lora_A["default"].weight.data.new_zeros(3, 14)
    third = copy.deepcopy(first)
    third.lora_A["default"].weight = first.lora_A["default"].weight
    model.base_model.model.third = third
    assert tall_adapters(model) == 1
    assert isinstance(second.lora_A["default"], TallLinear)


def test_an_adapter_added_later_stays_flat() -> None:
    model = small_model()
    tall_adapters(model)
    model.add_adapter("later", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "later"])
    pairs = find_pairs(model.double())
    assert [pair.stored_tall for pair in pairs] == [True, False, True]
    optimizer = adamw(model)
    handle = attach(model, optimizer, CONFIG)
    train_small(model, optimizer, small_batches(2))
    assert handle.report().applied_steps == 2 and not handle.report().skipped_pairs


def test_a_tensor_put_into_weight_data_is_lost() -> None:
    """As documented: `weight` is a view; what is done in place arrives."""
    layer = TallLinear(nn.Linear(4, 3, bias=False))
    before = layer.tall.detach().clone()
    layer.weight.data = torch.zeros(3, 4)
    assert torch.equal(layer.tall, before)
    with torch.no_grad():
        layer.weight.zero_()
    assert not layer.tall.any()
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = nn.Parameter(torch.zeros(3, 4))


# --- what comes too late, and what does not fit ---


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(TypeError, match=r"SmallNet has no LoRA layer: call peft.get_peft_model"):
        tall_adapters(SmallNet())


def test_an_optimizer_that_holds_the_parameters_is_refused() -> None:
    """And nothing is converted; once it is gone, all is."""
    model = small_model()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match=r"too late: AdamW holds the adapters' parameters.*before creating the optim"):
        tall_adapters(model)
    assert not any(pair.stored_tall for pair in find_pairs(model))
    del optimizer
    other = torch.optim.SGD(small_model(seed=3).parameters(), lr=1.0)
    assert tall_adapters(model) == 2
    del other


def test_starts_come_first() -> None:
    model = get_peft_model(SmallNet(), LoraConfig(r=3, target_modules=["first", "second"]))
    tall_adapters(model)
    with pytest.raises(ValueError, match="stored tall already: call initialize_adapters before tall_adapters"):
        initialize_adapters(model, "pissa")


@pytest.mark.parametrize("saved_tall", [True, False])
def test_a_checkpoint_goes_on_with_either_storage(saved_tall: bool, tmp_path: Path) -> None:
    """In one process and under DDP and FSDP2 a checkpoint has PEFT's form, Adam's moments too."""
    saved, loaded = both() if not saved_tall else reversed(both())
    optimizer = adamw(saved)
    handle = attach(saved, optimizer, CONFIG)
    train_small(saved, optimizer, small_batches(2))
    save_checkpoint(tmp_path / "checkpoint", saved, optimizer, handle)
    expected = train_small(saved, optimizer, small_batches(2, seed=4))
    optimizer = adamw(loaded)
    state = load_checkpoint(tmp_path / "checkpoint", loaded, optimizer)
    attach(loaded, optimizer, CONFIG, state_dict=state)
    found = train_small(loaded, optimizer, small_batches(2, seed=4))
    assert worst_factor_error(as_peft_names_them(found), as_peft_names_them(expected)) < 1e-9


@pytest.mark.parametrize("saved_tall", [True, False])
def test_a_handles_state_of_the_other_storage_is_refused(saved_tall: bool) -> None:
    """Moments that torch's own load_state_dict put there would be transposed."""
    saved, loaded = both() if not saved_tall else reversed(both())
    state = attach(saved, adamw(saved), CONFIG).state_dict()
    remedy = "call reflora_dist.tall_adapters" if saved_tall else "leave reflora_dist.tall_adapters out"
    with pytest.raises(ValueError, match=rf"stored {2 * saved_tall} lora_A tall.*would be read transposed.*{remedy}"):
        attach(loaded, adamw(loaded), CONFIG, state_dict=state)
    older = {key: value for key, value in state.items() if key != "stored_tall"}
    if not saved_tall:  # a release that stored none tall did not say so
        attach(saved_model := small_model(), adamw(saved_model), CONFIG, state_dict=older)


# --- the callback ---


@pytest.mark.parametrize(
    ("kind", "tall", "optimizer", "converted"),
    [
        ("FSDP", None, False, True),
        ("DEEPSPEED", None, False, True),
        ("MULTI_GPU", None, False, False),
        ("NO", None, False, False),
        ("FSDP", False, False, False),
        ("MULTI_GPU", True, False, True),
        ("FSDP", None, True, False),
    ],
)
def test_the_callback_converts_where_factors_will_be_sharded(
    kind: str, tall: bool | None, optimizer: bool, converted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"distributed_type": DistributedType(kind)})
    model = small_model()
    held = adamw(model) if optimizer else None
    callback = RefLoRACallback(CONFIG, tall=tall)
    arguments = TrainingArguments.__new__(TrainingArguments)
    callback.on_init_end(arguments, None, None, model=model, optimizer=held)  # type: ignore[arg-type]
    assert [pair.stored_tall for pair in find_pairs(model)] == [converted] * 2


def test_one_process_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """There flat adapters cost nothing."""
    model = small_model()
    with caplog.at_level(logging.WARNING, "reflora_dist"):
        attach(model, adamw(model), CONFIG)
    assert not caplog.records


def test_a_single_row_gets_strides_of_its_own() -> None:
    """With r = 1 a transposed tensor counts as contiguous, with strides on which DeepSpeed fails."""
    model = small_model(r=1)
    tall_adapters(model)
    for pair in find_pairs(model):
        assert pair.lora_a.stride() == (1, 1)
        pair.lora_a.data.view(torch.uint8)
