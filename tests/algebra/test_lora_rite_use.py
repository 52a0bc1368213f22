"""LoRA-RITE and LoRA-Muon in use: before and after attach, their state, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from reflora_dist import LoRAMuon, LoRARite, RefLoRAConfig, attach
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from reflora_dist.step.rite_step import packed_size
from tests.support.small import backward, own_optimizer, rite, small_batches, small_model, train_small, trainable
from tests.support.workloads import named_factors, worst_factor_error

CONFIG = RefLoRAConfig(method="lora-rite")
both = pytest.mark.parametrize("method", METHOD_OPTIMIZERS)
_OPTIONS: dict[str, dict[str, Any]] = {"lora-rite": {"apply_escape": True}, "lora-muon": {"momentum": 0.8}}


@both
def test_step_before_attach(method: str) -> None:
    """With gradients it raises and changes nothing; with zeros it creates the state and nothing else."""
    model = small_model()
    kind = METHOD_OPTIMIZERS[method]
    optimizer = kind(trainable(model), lr=0.1)
    before = [p.detach().clone() for p in trainable(model)]
    backward(model, small_batches(1)[0])
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}.step\(\) before attach\(\): .*method='{method}'"):
        optimizer.step()
    for parameter in trainable(model):
        parameter.grad.zero_()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, trainable(model), strict=True))
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    # and training afterwards is that of a new optimizer
    attach(model, optimizer, RefLoRAConfig(method=method))
    trained = train_small(model, optimizer, small_batches(3))
    fresh = small_model()
    expected = train_small(fresh, own_optimizer(method, fresh, lr=0.1)[0], small_batches(3))
    assert worst_factor_error(trained, expected) == 0.0


@both
def test_after_detach_a_step_raises_again(method: str) -> None:
    model = small_model()
    optimizer, handle = own_optimizer(method, model)
    train_small(model, optimizer, small_batches(1))
    handle.detach()
    backward(model, small_batches(1)[0])
    with pytest.raises(RuntimeError, match=r"before attach\(\)"):
        optimizer.step()
    attach(model, optimizer, RefLoRAConfig(method=method))
    optimizer.step()


@both
def test_detached_and_attached_again_it_continues(method: str) -> None:
    ends = []
    for interrupted in (False, True):
        model = small_model()
        optimizer, handle = own_optimizer(method, model)
        for index, batch in enumerate(small_batches(4)):
            if interrupted and index == 2:
                handle.detach()
                handle = attach(model, optimizer, handle.config, state_dict=handle.state_dict())
            train_small(model, optimizer, [batch])
        ends.append({name: f.detach() for name, f in named_factors(model).items()})
        assert handle.report().steps == 4
    assert worst_factor_error(*ends) == 0.0


@pytest.mark.parametrize(
    ("method", "make", "title"),
    [
        ("lora-rite", torch.optim.AdamW, "LoRA-RITE"),
        ("reflora", LoRARite, "LoRA-RITE"),
        ("reflora-s", LoRARite, "LoRA-RITE"),
        ("scaled-gd", LoRARite, "LoRA-RITE"),
        ("lora", LoRARite, "LoRA-RITE"),
        ("lora-rite", LoRAMuon, "LoRA-RITE"),
        ("lora-muon", torch.optim.AdamW, "LoRA-Muon"),
        ("lora-muon", LoRARite, "LoRA-Muon"),
        ("reflora", LoRAMuon, "LoRA-Muon"),
    ],
)
def test_optimizer_and_method_that_do_not_go_together(method: str, make: Any, title: str) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=f"{title} is an optimizer of its own"):
        attach(model, make(trainable(model), lr=1e-3), RefLoRAConfig(method=method))


@both
@pytest.mark.parametrize(("r", "refused"), [(9, False), (10, True)])
def test_a_factor_with_less_rows_than_r(r: int, refused: bool, method: str) -> None:
    """``second`` has 9 outputs: with r = 10 its lora_B has no 10 orthonormal directions."""
    model = small_model(r=r)
    optimizer, config = METHOD_OPTIMIZERS[method](trainable(model)), RefLoRAConfig(method=method)
    if refused:
        with pytest.raises(ValueError, match=rf"method='{method}' needs .*second.*has r=10 with in=14, out=9: lower r"):
            attach(model, optimizer, config)
    else:
        attach(model, optimizer, config)
        assert all(f.isfinite().all() for f in train_small(model, optimizer, small_batches(3)).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"clip_unmagnified_grad": -1.0},
        {"update_capping": -1.0},
        {"update_skipping": -1.0},
        {"lr": float("nan")},
    ],
)
def test_values_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        LoRARite([nn.Parameter(torch.zeros(2, 2))], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 1}, "is the optimizer itself and acts in every step: leave out warmup_steps=1"),
        ({"interval": 2}, "interval=2"),
    ],
)
@both
def test_schedules_are_refused(settings: dict[str, Any], message: str, method: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefLoRAConfig(method=method, **settings)


# --- state ---


def test_state_has_the_shapes_of_adams() -> None:
    """Nothing but moments of the parameter's own shape; the second one's head holds all there is."""
    model = small_model()
    optimizer, _ = rite(model, apply_escape=True)
    train_small(model, optimizer, small_batches(3))
    for parameter, state in optimizer.state.items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        size = packed_size(3)
        assert state["exp_avg_sq"].view(-1)[:size].all() and not state["exp_avg_sq"].view(-1)[size:].any()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_continues_bit_by_bit(dtype: torch.dtype, method: str) -> None:
    """Saved, pickled and loaded into a new optimizer; moments of bf16 weights stay fp32."""
    batches = small_batches(6, dtype=dtype)
    model = small_model(dtype=dtype)
    optimizer, _ = own_optimizer(method, model, **_OPTIONS[method])
    train_small(model, optimizer, batches[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    expected = train_small(model, optimizer, batches[3:])

    file.seek(0)
    resumed = METHOD_OPTIMIZERS[method](trainable(other), **{"lr": 0.02, **_OPTIONS[method]})
    resumed.load_state_dict(torch.load(file))
    attach(other, resumed, RefLoRAConfig(method=method))
    moments = torch.promote_types(dtype, torch.float32)
    assert all(s[key].dtype == moments for s in resumed.state.values() for key in ("exp_avg", "exp_avg_sq"))
    factors = train_small(other, resumed, batches[3:])
    assert all(torch.equal(factors[name], expected[name]) for name in expected)


class _WithHead(nn.Module):
    """The small network, with a head that is used when asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = small_model()
        width = small_batches(1)[0].shape[-1]
        self.head = nn.Linear(width, 3).to(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_16_bits_and_one_that_is_used_late_follow_adamw(dtype: torch.dtype, method: str) -> None:
    """PEFT leaves modules_to_save in the base's precision; AdamW counts steps from a parameter's first gradient."""
    model = _WithHead(dtype)
    twin = copy.deepcopy(model.head).to(torch.float32)
    optimizer = METHOD_OPTIMIZERS[method](trainable(model), lr=0.02, weight_decay=0.1)
    attach(model, optimizer, RefLoRAConfig(method=method))
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step, batch in enumerate(small_batches(5)):
        backward(model.body, batch)
        if step >= 2:
            for own, other in zip(model.head.parameters(), twin.parameters(), strict=True):
                other.grad = torch.randn(other.shape, generator=generator).to(dtype).float()
                own.grad = other.grad.to(dtype)
            adamw.step()
        optimizer.step()
        for own, other in zip(model.head.parameters(), twin.parameters(), strict=True):
            with torch.no_grad():
                other.copy_(other.to(dtype))  # rounded after every step, as the parameter is
            assert torch.equal(own.detach().float(), other.detach())
        optimizer.zero_grad()


def test_betas_of_a_group_act_on_its_factors() -> None:
    trained = {}
    for name, betas in (("group", (0.5, 0.9)), ("constructor", (0.5, 0.9)), ("default", (0.9, 0.999))):
        model = small_model()
        in_group = name == "group"
        groups = [{"params": trainable(model), "betas": betas}] if in_group else trainable(model)
        optimizer = LoRARite(groups, lr=0.02, **({} if in_group else {"betas": betas}))
        attach(model, optimizer, CONFIG)
        trained[name] = train_small(model, optimizer, small_batches(4))
    assert worst_factor_error(trained["group"], trained["constructor"]) == 0
    assert worst_factor_error(trained["group"], trained["default"]) > 1e-3


def test_a_copied_optimizer_keeps_its_settings() -> None:
    optimizer = LoRARite(trainable(small_model()), lr=0.02, update_capping=0.3)
    assert copy.deepcopy(optimizer).settings == optimizer.settings
