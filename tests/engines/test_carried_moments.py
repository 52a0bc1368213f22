"""RefLoRA's first step replaces the moments that Adam holds of the warm-up; the engines are in test_engines_parity."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.methods.reference import refactorization
from reflora_dist.step.handle_state import handle_state
from tests.support.matrices import relative
from tests.support.oracles import GradientOracle
from tests.support.small import backward, small_batches, small_model, train_small, trainable
from tests.support.workloads import Factors, worst_factor_error

CONFIG = RefLoRAConfig(warmup_steps=3, interval=2, carry_moments=True)
PUBLISHED = dataclasses.replace(CONFIG, carry_moments=False)
_RATE = 2e-2


def _trained(hook: Any, config: RefLoRAConfig, kind: Any, **settings: Any) -> Factors:
    model = small_model(from_zero=True, rank_pattern={"second": 2})
    optimizer = kind(trainable(model), lr=_RATE, **settings)
    hook(model, optimizer, config)
    return train_small(model, optimizer, small_batches(8))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(torch.optim.AdamW, {}), (torch.optim.Adam, {"amsgrad": True}), (torch.optim.NAdam, {}), (torch.optim.RAdam, {})],
)
def test_training_follows_the_oracle(kind: Any, settings: dict[str, Any]) -> None:
    trained = _trained(attach, CONFIG, kind, **settings)
    assert worst_factor_error(trained, _trained(GradientOracle, CONFIG, kind, **settings)) < 1e-8
    assert worst_factor_error(trained, _trained(attach, PUBLISHED, kind, **settings)) > 1e-2


def test_first_moments_are_those_of_refactored_gradients() -> None:
    """A training whose gradients were refactored by that S all along has the same first moments."""
    model, batch = small_model(), small_batches(1)[0]
    optimizer = torch.optim.AdamW(trainable(model), lr=0.0, weight_decay=0.0)  # S stays as it is
    attach(model, optimizer, dataclasses.replace(CONFIG, warmup_steps=2))
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    for pair in find_pairs(model):
        solution = refactorization(pair.lora_a.detach(), pair.lora_b.detach())
        assert solution is not None
        for factor in (pair.lora_a, pair.lora_b):
            share = 1 - 0.9**3  # three equal gradients
            assert factor.grad is not None
            assert relative(optimizer.state[factor]["exp_avg"], share * factor.grad) < 1e-10


@pytest.mark.parametrize("as_plain_lora", [True, False])
def test_a_run_that_is_past_its_warm_up_when_the_method_begins_replaces_them_then(as_plain_lora: bool) -> None:
    """Resumed from a run without the method, or with a shorter warm-up, as if the warm-up had been that long."""
    batches, config = small_batches(6), RefLoRAConfig(warmup_steps=5, carry_moments=True)
    model = small_model(from_zero=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=_RATE)
    attach(model, optimizer, config)
    expected = train_small(model, optimizer, batches)
    model = small_model(from_zero=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=_RATE)
    handle = attach(model, optimizer, dataclasses.replace(config, warmup_steps=8))
    train_small(model, optimizer, batches[:5])
    handle.detach()
    shorter = dataclasses.replace(config, warmup_steps=3)
    attach(model, optimizer, shorter, state_dict=handle_state(shorter, 5) if as_plain_lora else handle.state_dict())
    assert worst_factor_error(train_small(model, optimizer, batches[5:]), expected) == 0.0


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_replaces_them_once(stop: int) -> None:
    batches = small_batches(6)
    model = small_model(from_zero=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=_RATE)
    handle = attach(model, optimizer, CONFIG)
    train_small(model, optimizer, batches[:stop])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    expected = train_small(model, optimizer, batches[stop:])
    resumed = small_model()
    resumed.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(trainable(resumed), lr=_RATE)
    optimizer.load_state_dict(saved[1])
    attach(resumed, optimizer, CONFIG, state_dict=saved[2])
    assert worst_factor_error(train_small(resumed, optimizer, batches[stop:]), expected) == 0.0


def test_a_pair_without_s_keeps_its_moments() -> None:
    """Those of the other pair change."""
    model, batch = small_model(), small_batches(1)[0]
    optimizer = torch.optim.AdamW(trainable(model), lr=0.0, weight_decay=0.0)
    handle = attach(model, optimizer, dataclasses.replace(CONFIG, warmup_steps=1))
    backward(model, batch)
    optimizer.step()
    without, other = find_pairs(model)
    with torch.no_grad():
        without.lora_b[:, 0] = 0.0
        for moments in optimizer.state.values():
            moments["exp_avg"].fill_(1e4)  # beside which gradients are nothing
    optimizer.zero_grad()
    backward(model, batch)
    optimizer.step()
    for pair, stayed in ((without, True), (other, False)):
        for factor in (pair.lora_a, pair.lora_b):
            decayed = torch.full_like(factor, 0.9e4)
            assert (relative(optimizer.state[factor]["exp_avg"], decayed) < 1e-2) == stayed
    assert handle.report().skipped_pairs == 1


def test_an_optimizer_without_a_state_has_none() -> None:
    """A run that goes on from weights alone."""
    ends = []
    for config in (CONFIG, PUBLISHED):
        model, (batch, *_) = small_model(), small_batches(1)
        optimizer = torch.optim.AdamW(trainable(model), lr=_RATE)
        attach(model, optimizer, config).load_state_dict(_state_after_the_warmup(config))
        ends.append(train_small(model, optimizer, [batch]))
    assert worst_factor_error(*ends) == 0.0


def _state_after_the_warmup(config: RefLoRAConfig) -> dict[str, Any]:
    model = small_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=_RATE)
    handle = attach(model, optimizer, config)
    train_small(model, optimizer, small_batches(3))
    return handle.state_dict()


def test_float16_moments_beyond_its_range_leave_the_pair_as_it_is() -> None:
    ends = []
    for config in (CONFIG, PUBLISHED):
        model = small_model(dtype=torch.float16)
        optimizer = torch.optim.Adam(trainable(model), lr=1e-3, eps=1e-4)
        handle = attach(model, optimizer, dataclasses.replace(config, warmup_steps=1))
        for step, batch in enumerate(small_batches(2, dtype=torch.float16)):
            optimizer.zero_grad()
            backward(model, batch)
            if step == 1:
                pair = find_pairs(model)[0]
                with torch.no_grad():
                    pair.lora_b.mul_(1e-2)  # S^-1 is a hundred, and its square ten thousand
                optimizer.state[pair.lora_a]["exp_avg_sq"].fill_(60.0)
            optimizer.step()
        ends.append((handle.report().skipped_pairs, optimizer.state[pair.lora_a]["exp_avg_sq"].isfinite().all()))
    assert ends == [(1, True), (0, True)]


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"carry_moments=True with method='reflora' is about .* and warmup_steps=0"):
        RefLoRAConfig(carry_moments=True, warmup_steps=0)
    with pytest.raises(ValueError, match="carry_moments=True means nothing to method='scaled-gd'"):
        RefLoRAConfig(method="scaled-gd", carry_moments=True)
    model = small_model()
    with pytest.raises(
        ValueError, match=r"method='reflora' with carry_moments=True rescales .* SGD is not one of Adam"
    ):
        attach(model, torch.optim.SGD(trainable(model), lr=0.1), CONFIG)
