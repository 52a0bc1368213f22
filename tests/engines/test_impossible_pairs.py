"""Where a method does not exist, or its result would not be finite, a pair is left to plain LoRA: bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from reflora_dist import RefLoRAConfig, attach

R = 4
METHODS = ("reflora", "lora-pro")


def _gradients_after(
    method: str, sizes: tuple[int, int], lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the second of two layers before and after a step; the first one, 16 x 16, can be refactored."""
    generator = torch.Generator().manual_seed(0)
    n_in, n_out = sizes
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(n_in, n_out))
    model = get_peft_model(layers, LoraConfig(r=R, target_modules=["0", "1"]), autocast_adapter_dtype=False).to(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    for parameter, values in zip(parameters[2:], (lora_a, lora_b), strict=True):
        parameter.data.copy_(values)
    before = [parameter.grad.clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=0))
    optimizer.step()
    after = [parameter.grad for parameter in parameters]
    assert not torch.equal(before[0], after[0])  # the possible pair is refactored
    return before[2:], after[2:]


@pytest.mark.parametrize("method", METHODS)
@given(
    sizes=st.sampled_from([(16, 3), (3, 16), (2, 3), (16, 1)]),
    seed=st.integers(0, 2**31),
    condition=st.sampled_from([1.0, 1e2, 1e4, 1e8]),
)
@settings(max_examples=25, deadline=None)
def test_with_r_above_in_or_out_gradients_stay_as_they_are(
    method: str, sizes: tuple[int, int], seed: int, condition: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), R)
    lora_a = spectrum[:, None] * torch.randn(R, sizes[0], generator=generator)
    lora_b = torch.randn(sizes[1], R, generator=generator) * spectrum
    before, after = _gradients_after(method, sizes, lora_a, lora_b)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("method", METHODS)
def test_where_r_is_too_high_everywhere_attach_refuses(method: str) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(16, 3)), LoraConfig(r=R, target_modules=["0"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ValueError, match=r"r=4 is above in=16 or out=3 .* lower r"):
        attach(model, optimizer, RefLoRAConfig(method=method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(exponent_a=st.integers(-30, 15), exponent_b=st.integers(-30, 15))
@settings(max_examples=25, deadline=None)
def test_finite_gradients_stay_finite_at_any_scale(
    method: str, dtype: torch.dtype, exponent_a: int, exponent_b: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.randn(R, 16, generator=generator) * 10.0**exponent_a
    lora_b = torch.randn(16, R, generator=generator) * 10.0**exponent_b
    _, after = _gradients_after(method, (16, 16), lora_a, lora_b, dtype)
    assert all(bool(gradient.isfinite().all()) for gradient in after)
