"""BaLoRA in one process: the published trajectory, and what defines balanced factors and their moments."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.methods.balora import balance
from tests.support import oracles
from tests.support.launchers import REPOSITORY
from tests.support.matrices import factor, relative
from tests.support.small import backward, products, small_batches, small_model, train_small, trainable
from tests.support.workloads import (
    as_products,
    build_model,
    load_reference,
    train_single,
    worst_factor_error,
    worst_loss_error,
)

PUBLISHED = REPOSITORY / "tests" / "support" / "reference" / "balora"
STARTED = RefLoRAConfig(method="balora", warmup_steps=0)
ADAMS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_published_code_ends_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step of AdamW, factor by factor; of SGD the products, which no choice of signs changes."""
    monkeypatch.setenv("REFLORA_REFERENCE", str(PUBLISHED.parent))
    reference, meta = load_reference(), json.loads((PUBLISHED / "meta.json").read_text())
    expected = {name: value.double() for name, value in load_file(PUBLISHED / f"factors_{kind}.safetensors").items()}
    ends = []
    for method in ("balora", "lora"):
        model = build_model(reference, dtype=torch.float64)
        optimizer: Any = reference.settings.optimizer(trainable(model))
        if kind == "sgd":
            optimizer = torch.optim.SGD(trainable(model), lr=meta["sgd_lr"])
        handle = attach(model, optimizer, RefLoRAConfig(method=method))
        losses, factors = train_single(model, reference.batches, reference.settings, optimizer=optimizer)
        ends.append((losses, factors if kind == "adamw" else as_products(factors)))
        assert handle.report().skipped_pairs == 0
    wanted = expected if kind == "adamw" else as_products(expected)
    (losses, factors), (_, plain) = ends
    assert worst_factor_error(factors, wanted) < 1e-6  # stored in float32
    assert worst_loss_error(losses, meta["losses"][kind]) < 1e-6
    assert worst_factor_error(plain, wanted) > 1e-2


@given(
    r=st.integers(1, 6),
    rows=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    log_conditions=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    log_scale=st.floats(-6, 6),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_new_factors_are_the_singular_vectors(
    r: int, rows: tuple[int, int], log_conditions: tuple[float, float], log_scale: float, seed: int
) -> None:
    """The oracle takes them from the product of the factors themselves; the Grams become equal and diagonal."""
    tall_a, lora_b = (
        factor(r + more, r, 10**condition, seed + side)
        for side, (more, condition) in enumerate(zip(rows, log_conditions, strict=True))
    )
    lora_a = 10**log_scale * tall_a.mT
    grams = torch.stack([lora_a @ lora_a.mT, lora_b.mT @ lora_b])
    matrices, solved = balance(grams[:, None])
    of_a, of_b = matrices[:, 0]
    assert solved.tolist() == [True]
    new_a, new_b = of_a.mT @ lora_a, lora_b @ of_b
    product = lora_b @ lora_a
    assert relative(new_b @ new_a, product) < 1e-10
    sigma = torch.linalg.svdvals(product)[:r]
    for gram in (new_a @ new_a.mT, new_b.mT @ new_b):
        assert float((gram - torch.diag(sigma)).norm() / sigma.norm()) < 1e-9
    gap = float((-sigma.diff()).min() / sigma[0]) if r > 1 else 1.0
    if gap > 1e-3:  # singular vectors of close singular values are any basis of their span
        for new, exact in zip((new_a, new_b), oracles.balanced(lora_a, lora_b), strict=True):
            assert relative(new, exact) < 1e-7


def _rewritten(
    model: nn.Module, *, carry_moments: bool, **optimizer_settings: Any
) -> tuple[torch.optim.Optimizer, dict[str, list[Tensor]]]:
    """A step of size zero of AdamW, after which the factors are balanced; its moments as plain LoRA leaves them."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0, **optimizer_settings)
    config = RefLoRAConfig(method="balora", carry_moments=carry_moments)
    attach(model, optimizer, config)
    gradients = [p.grad.clone() for p in trainable(model)]
    optimizer.step()
    return optimizer, {"exp_avg": gradients, "exp_avg_sq": [gradient.square() for gradient in gradients]}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_become_those_of_the_new_factors(amsgrad: bool) -> None:
    """First moments: the gradient of the new factors. Second: its variance, were a row's components uncorrelated."""
    model = small_model()
    batch = small_batches(1)[0]
    backward(model, batch)
    before = [p.detach().clone() for p in trainable(model)]
    optimizer, old = _rewritten(model, carry_moments=True, amsgrad=amsgrad)
    optimizer.zero_grad()
    backward(model, batch)
    for parameter in trainable(model):
        assert relative(optimizer.state[parameter]["exp_avg"], parameter.grad) < 1e-10
    for pair in range(0, 4, 2):
        lora_a, lora_b = trainable(model)[pair : pair + 2]
        change = torch.linalg.lstsq(before[pair].mT, lora_a.detach().mT).solution.mT  # N of N A and B N^-1
        of_a = torch.linalg.inv(change).mT.square() @ old["exp_avg_sq"][pair]
        of_b = old["exp_avg_sq"][pair + 1] @ change.mT.square()
        for key in ("exp_avg_sq", "max_exp_avg_sq")[: 1 + amsgrad]:
            assert relative(optimizer.state[lora_a][key], of_a) < 1e-10
            assert relative(optimizer.state[lora_b][key], of_b) < 1e-10


def test_by_default_moments_stay_as_they_are() -> None:
    model = small_model()
    backward(model, small_batches(1)[0])
    before = products(model)
    optimizer, old = _rewritten(model, carry_moments=False)
    for key in ADAMS:
        assert all(map(torch.equal, (optimizer.state[p][key] for p in trainable(model)), old[key]))
    assert all(relative(now, then) < 1e-12 for now, then in zip(products(model), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_stays_to_rounding(dtype: torch.dtype) -> None:
    """Factors are formed in float64 and rounded once, whatever their norms."""
    model = small_model(dtype=dtype)
    pairs = find_pairs(model)
    with torch.no_grad():
        pairs[0].lora_b.mul_(1e-4)
    before = [(pair.lora_b.double() @ pair.lora_a.double()).detach() for pair in pairs]
    handle = attach(model, torch.optim.SGD(trainable(model), lr=0.1), STARTED)
    rounding = torch.finfo(dtype).eps
    for pair, product in zip(pairs, before, strict=True):
        lora_a, lora_b = pair.lora_a.detach().double(), pair.lora_b.detach().double()
        assert relative(lora_b @ lora_a, product) < 2 * rounding
        assert relative(lora_a @ lora_a.mT, lora_b.mT @ lora_b) < 8 * rounding
    assert handle.report().skipped_pairs == 0


def test_balanced_factors_keep_their_signs() -> None:
    """An SVD may turn any direction round, and Adam's moments would then push it back."""
    model = small_model()
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    attach(model, optimizer, STARTED)
    once = [p.detach().clone() for p in trainable(model)]
    for _ in range(3):
        backward(model, small_batches(1)[0])
        optimizer.step()
    assert all(relative(p.detach(), before) < 1e-10 for p, before in zip(trainable(model), once, strict=True))


def test_a_pair_without_full_rank_stays_as_it_is() -> None:
    """Bit for bit, and is counted: B = 0 before the first step, or a dead direction; the other pair is balanced."""
    model = small_model(from_zero=True)
    handle = attach(model, torch.optim.AdamW(trainable(model), lr=1e-2), STARTED)
    assert handle.report().skipped_pairs == 2
    assert not trainable(model)[1].any() and trainable(model)[0].any()
    model = small_model()
    with torch.no_grad():
        find_pairs(model)[0].lora_b[:, 2] = find_pairs(model)[0].lora_b[:, 0]
    before = [p.detach().clone() for p in trainable(model)]
    handle = attach(model, torch.optim.AdamW(trainable(model), lr=1e-2), STARTED)
    assert handle.report().skipped_pairs == 1
    unchanged = [torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True)]
    assert unchanged == [True, True, False, False]


def test_where_r_is_too_high_the_others_are_balanced() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    model = get_peft_model(layers, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    before = [p.detach().clone() for p in trainable(model)]
    handle = attach(model, torch.optim.AdamW(trainable(model), lr=1e-2), STARTED)
    unchanged = [torch.equal(p, old) for p, old in zip(trainable(model), before, strict=True)]
    assert unchanged == [False, False, True, True] and handle.report().skipped_pairs == 1


def test_schedule_from_zero() -> None:
    """By default it acts after the first step, when B is no longer zero; an interval leaves steps out."""
    for interval, applied in ((1, 5), (2, 3)):
        model = small_model(from_zero=True)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        handle = attach(model, optimizer, RefLoRAConfig(method="balora", interval=interval))
        train_small(model, optimizer, small_batches(5))
        assert (handle.report().applied_steps, handle.report().skipped_pairs) == (applied, 0)


def test_which_optimizers_and_settings_are_accepted() -> None:
    """Moments that are left alone may be any; those that are carried along are Adam's."""
    carried = RefLoRAConfig(method="balora", carry_moments=True)
    model = small_model()
    with pytest.raises(ValueError, match=r"method='balora' with carry_moments=True rescales .* SGD is not one of Adam"):
        attach(model, torch.optim.SGD(trainable(model), lr=0.1), carried)
    attach(model, torch.optim.RMSprop(trainable(model), lr=0.1), STARTED)
    with pytest.raises(ValueError, match="carry_moments=1 must be True or False"):
        RefLoRAConfig(method="balora", carry_moments=1)  # type: ignore[arg-type]


def test_trained_models_differ_with_and_without_moments() -> None:
    """Both follow their oracle through a whole training."""
    ends = []
    for carry_moments in (False, True):
        config = RefLoRAConfig(method="balora", carry_moments=carry_moments)
        trained = []
        for hook in (attach, oracles.BalanceOracle):
            model = small_model(from_zero=True, rank_pattern={"second": 2})
            optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
            hook(model, optimizer, config)
            trained.append(train_small(model, optimizer, small_batches(8)))
        assert worst_factor_error(*trained) < 1e-8
        ends.append(trained[0])
    assert worst_factor_error(*ends) > 1e-2


def test_a_resumed_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Bit for bit; a setting that changed in between is told."""
    config = RefLoRAConfig(method="balora", carry_moments=True, interval=2)
    batches = small_batches(6)
    model = small_model(from_zero=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    handle = attach(model, optimizer, config)
    train_small(model, optimizer, batches[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    expected = train_small(model, optimizer, batches[3:])
    for continued, warns in ((config, False), (dataclasses.replace(config, carry_moments=False), True)):
        resumed = small_model()
        resumed.load_state_dict(saved[0])
        optimizer = torch.optim.AdamW(trainable(resumed), lr=1e-2)
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        caplog.clear()
        attach(resumed, optimizer, continued, state_dict=saved[2])
        assert ("carry_moments=False in place of True" in caplog.text) == warns
        error = worst_factor_error(train_small(resumed, optimizer, batches[3:]), expected)
        assert error > 1e-4 if warns else error == 0.0
