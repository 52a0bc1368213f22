"""Random LoRA models: a step's gradients are those of the plain float64 oracles, plain LoRA's, or attach refuses.

``pytest tests/files/test_properties_models.py --examples 1000`` tries more.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reflora_dist import RefLoRAConfig, attach, tall_adapters
from reflora_dist.methods.reference import refactorization
from tests.support.oracles import new_gradients
from tests.support.tally import raised_by_us, tried

_KINDS = ("linear", "embedding", "conv1d", "conv2d", "transformers' Conv1D", "grouped")
_GRADIENT_METHODS = ("reflora", "scaled-gd", "lora-pro", "lora")
# factors and results are rounded once to their dtype; in fp64 S and its inverse have the Grams' errors
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclasses.dataclass
class Case:
    """One random model and method."""

    layers: list[tuple[str, int, int]]
    method: str
    r: int
    alpha: int
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, int]
    lora: dict[str, Any]
    dtype: torch.dtype
    autocast: bool
    second: int | None
    tall: bool
    frozen: str
    shared: str
    scales: tuple[float, float]
    warmup_steps: int
    optimizer: str
    seed: int


@st.composite
def cases(draw: st.DrawFn, methods: tuple[str, ...]) -> Case:
    sizes = st.integers(1, 12)
    kinds = st.sampled_from([*_KINDS[:-1] * 3, "grouped"])
    layers = draw(st.lists(st.tuples(kinds, sizes, sizes), min_size=1, max_size=4))
    names = st.sampled_from([f"l{number}" for number in range(len(layers))])
    ranks = st.integers(1, 6)
    lora = {
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "modules_to_save": draw(st.sampled_from([None, ["head"]])),
        "init_lora_weights": draw(st.sampled_from([True, False])),
    }
    several = lora["bias"] == "none" and lora["modules_to_save"] is None  # PEFT has these for one adapter at a time
    return Case(
        layers=layers,
        method=draw(st.sampled_from(methods)),
        r=draw(ranks),
        alpha=draw(st.integers(1, 16)),
        rank_pattern=draw(st.dictionaries(names, ranks, max_size=2)),
        alpha_pattern=draw(st.dictionaries(names, st.integers(1, 16), max_size=2)),
        lora=lora,
        dtype=draw(st.sampled_from(list(_TOLERANCE))),
        autocast=draw(st.booleans()),
        second=draw(st.none() | ranks) if several else None,
        tall=draw(st.booleans()),
        frozen=draw(st.sampled_from([*[""] * 8, "lora_A", "lora_B", "both"])),
        shared=draw(st.sampled_from([*[""] * 4, "layer", "base", "factor"])),
        scales=draw(st.tuples(st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from([0.0, 0.1, 1.0, 10.0]))),
        warmup_steps=draw(st.sampled_from([0, 0, 0, 1])),
        optimizer=draw(st.sampled_from(["SGD", "AdamW", "AdamW", "AdamW"])),
        seed=draw(st.integers(0, 2**31)),
    )


def _layer(kind: str, n_in: int, n_out: int) -> nn.Module:
    match kind:
        case "linear":
            return nn.Linear(n_in, n_out)
        case "embedding":
            return nn.Embedding(n_in, n_out)
        case "conv1d":
            return nn.Conv1d(n_in, n_out, 2)
        case "conv2d":
            return nn.Conv2d(n_in, n_out, (1, 2))
        case "grouped":
            return nn.Conv2d(2 * n_in, 2 * n_out, 1, groups=2)
    return Conv1D(n_out, n_in)


class _Net(nn.Module):
    """Layers side by side: nothing is computed with them, gradients are drawn."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for number, layer in enumerate(case.layers):
            setattr(self, f"l{number}", _layer(*layer))
        self.head = nn.Linear(3, 2)


def _model(case: Case) -> PeftModel:
    net = _Net(case).to(case.dtype)
    if case.shared == "base":
        twins = [layer for layer in net.children() if getattr(layer, "weight", None) is not None]
        for one, other in itertools.pairwise(twins):
            if one.weight.shape == other.weight.shape and type(one) is type(other):
                other.weight = one.weight
    names = [f"l{number}" for number in range(len(case.layers))]
    config: dict[str, Any] = {"target_modules": names, "lora_alpha": case.alpha, **case.lora}
    patterns = {"rank_pattern": case.rank_pattern, "alpha_pattern": case.alpha_pattern}
    # PEFT lets a grouped convolution have no r that its groups do not divide
    if any(kind == "grouped" for kind, *_ in case.layers):
        case.r, case.rank_pattern, case.second = 2, {}, None
        patterns["rank_pattern"] = {}
    model = get_peft_model(net, LoraConfig(r=case.r, **config, **patterns), autocast_adapter_dtype=case.autocast)
    if case.second is not None:
        model.add_adapter("second", LoraConfig(r=case.second, **config))
        model.base_model.set_adapter(["default", "second"])
    return model


@dataclasses.dataclass
class _Pair:
    """The parameters of an active adapter, looked up without the package."""

    a: nn.Parameter
    b: nn.Parameter
    tall: bool
    scaling: float

    def matrices(self, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[r, in]`` and ``[out, r]`` of tensors that are stored as the factors are."""
        assert a is not None and b is not None
        return (a.T if self.tall else a.flatten(1)), b.flatten(1)

    @property
    def possible(self) -> bool:
        """Whether r is above neither dimension."""
        a, b = self.matrices(self.a, self.b)
        return a.shape[0] <= min(a.shape[1], b.shape[0])


def _pairs(model: nn.Module) -> list[_Pair]:
    pairs = []
    for layer in model.modules():
        for adapter in layer.active_adapters if isinstance(layer, LoraLayer) else ():
            embedding = adapter in layer.lora_embedding_A
            a: Any = layer.lora_embedding_A[adapter] if embedding else layer.lora_A[adapter]
            b: Any = layer.lora_embedding_B[adapter] if embedding else layer.lora_B[adapter].weight
            tall = not embedding and hasattr(a, "tall")
            pairs.append(_Pair(a if embedding else a.tall if tall else a.weight, b, tall, layer.scaling[adapter]))
    return pairs


def _share(model: PeftModel, case: Case) -> bool:
    """Use one LoRA layer in two places, or one lora_A in two of them. Returns whether a factor is shared."""
    net: Any = model.base_model.model
    layers = [layer for layer in net.children() if isinstance(layer, LoraLayer)]
    if case.shared == "layer":
        net.alias = layers[0]
    plain = [layer.lora_A["default"] for layer in layers if "default" in layer.lora_A]
    for one, other in itertools.pairwise(plain):
        if case.shared == "factor" and type(one) is type(other) and one.weight.shape == other.weight.shape:
            other.weight = one.weight
            return True
    return False


def _well_conditioned(rows: int, columns: int, scale: float, generator: torch.Generator) -> Tensor:
    """Singular values from scale / 2 to 2 scale."""
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator).double(), full_matrices=False)
    return (u * scale * torch.linspace(0.5, 2.0, u.shape[1]).double()) @ v


def _fill(model: nn.Module, case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    scales = (1.0, min(case.scales[1], 1.0)) if case.dtype == torch.float16 else case.scales
    with torch.no_grad():
        for pair in _pairs(model):
            for matrix, scale in zip(pair.matrices(pair.a, pair.b), scales, strict=True):
                matrix.copy_(_well_conditioned(*matrix.shape, scale, generator).to(matrix.dtype))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    will_be_refused = case.frozen or any(kind == "grouped" for kind, *_ in case.layers)
    for pair in _pairs(model) if case.method == "lora-pro" and not will_be_refused else []:
        # which rests on both being gradients of one product: of a whole weight's gradient W, s B^T W and s W A^T
        a, b = (matrix.detach().double() for matrix in pair.matrices(pair.a, pair.b))
        whole = pair.scaling * torch.randn(b.shape[0], a.shape[1], generator=generator).double()
        for gradient, value in zip(pair.matrices(pair.a.grad, pair.b.grad), (b.T @ whole, whole @ a.T), strict=True):
            gradient.copy_(value.to(gradient.dtype))


def _expected_refusals(case: Case, pairs: list[_Pair], shares_factor: bool) -> list[str]:
    impossible = case.method in ("reflora", "lora-pro", "balora") and not any(pair.possible for pair in pairs)
    reasons = {
        "is frozen": bool(case.frozen),
        "groups=2": any(kind == "grouped" for kind, *_ in case.layers),
        "share a factor": shares_factor,
        "is above in=": impossible,
        "rescales Adam's moments": case.method == "reflora-s" and case.optimizer == "SGD",
    }
    return [reason for reason, holds in reasons.items() if holds]


def _largest_errors(case: Case, pair: _Pair, tensors: tuple[Tensor, ...], damping: float) -> tuple[float, float]:
    """What the norms of a step's results are made of; a rounding is in proportion to it."""
    a, b, grad_a, grad_b = tensors
    norm_a, norm_b = float(grad_a.norm()), float(grad_b.norm())
    least = [float(torch.linalg.svdvals(m)[-1]) ** 2 if pair.possible else 0.0 for m in (a, b)]
    if case.method == "reflora":
        solution = refactorization(a, b)
        assert solution is not None
        s, s_inv = (float(torch.linalg.matrix_norm(matrix, 2)) for matrix in solution)
        return s_inv * norm_a, s * norm_b
    if case.method == "scaled-gd":
        return norm_a / (least[1] + damping), norm_b / (least[0] + damping)
    natural_a, natural_b = (n / k / pair.scaling**2 for n, k in ((norm_a, least[1]), (norm_b, least[0])))
    x = natural_a * float(a.norm()) / sum(least)
    return natural_a + x * float(a.norm()), natural_b + x * float(b.norm())


def _check_gradients(case: Case, pairs: list[_Pair], before: dict[nn.Parameter, Tensor]) -> None:
    config = RefLoRAConfig(method=case.method)
    for pair in pairs:
        factors = pair.matrices(pair.a.detach(), pair.b.detach())
        gradients = pair.matrices(before[pair.a], before[pair.b])
        got = pair.matrices(pair.a.grad, pair.b.grad)
        is_zero = not factors[1].any()
        alone = case.method == "lora" or case.warmup_steps > 0
        alone |= case.method in ("reflora", "lora-pro") and (not pair.possible or is_zero)
        if alone:
            assert all(map(torch.equal, got, gradients))
            continue
        tensors = tuple(tensor.double() for tensor in (*factors, *gradients))
        want = new_gradients(config, *tensors, pair.scaling)  # type: ignore[arg-type]
        for side, error in enumerate(_largest_errors(case, pair, tensors, config.damping)):
            difference = float((got[side].double() - want[side]).norm())
            assert difference <= _TOLERANCE[got[side].dtype] * error, (side, difference, error)


def _attached(case: Case) -> tuple[PeftModel, list[_Pair], torch.optim.Optimizer, list[str]]:
    model = _model(case)
    shares_factor = _share(model, case)
    if case.frozen:
        frozen = _pairs(model)[-1]
        for name, parameter in (("lora_A", frozen.a), ("lora_B", frozen.b)):
            parameter.requires_grad_(case.frozen not in (name, "both"))
    if case.tall:
        tall_adapters(model)
    _fill(model, case)
    pairs = _pairs(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = parameters or [nn.Parameter(torch.zeros(1))]  # where all of them are frozen
    # Adam's usual eps is zero in fp16, and no step of size zero then, but 0 / 0
    further = {"eps": 1e-3} if case.optimizer == "AdamW" else {}
    optimizer = getattr(torch.optim, case.optimizer)(parameters, lr=0.0, weight_decay=0.0, **further)
    return model, pairs, optimizer, _expected_refusals(case, pairs, shares_factor)


def _steps(case: Case, model: Any, optimizer: torch.optim.Optimizer, refusals: list[str]) -> bool:
    """Attach and step; False where attach refuses the model, as it must if there are ``refusals``."""
    config = RefLoRAConfig(method=case.method, warmup_steps=case.warmup_steps)
    if refusals:
        with pytest.raises(ValueError, match="|".join(refusals)) as raised:
            attach(model, optimizer, config)
        assert raised_by_us(raised.value)
        return False
    attach(model, optimizer, config)
    optimizer.step()
    return True


@given(case=cases(_GRADIENT_METHODS))
@settings(deadline=None)
def test_gradients_are_the_oracles_or_plain_loras(case: Case) -> None:
    with tried("random LoRA models, gradient methods") as outcome:
        model, pairs, optimizer, refusals = _attached(case)
        before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        outcome.refused = not _steps(case, model, optimizer, refusals)
        if outcome.refused:
            return
        _check_gradients(case, pairs, before)
        factors = {id(parameter) for pair in pairs for parameter in (pair.a, pair.b)}
        others = [(p.grad, gradient) for p, gradient in before.items() if id(p) not in factors]
        assert all(after is not None and torch.equal(after, gradient) for after, gradient in others)


@given(case=cases(("reflora-s", "balora")))
@settings(deadline=None)
def test_factors_are_balanced_and_their_product_stays(case: Case) -> None:
    with tried("random LoRA models, RefLoRA-S and BaLoRA") as outcome:
        model, pairs, optimizer, refusals = _attached(case)
        before = [[factor.detach().double() for factor in pair.matrices(pair.a, pair.b)] for pair in pairs]
        outcome.refused = not _steps(case, model, optimizer, refusals)
        if outcome.refused:
            return
        for pair, (a, b) in zip(pairs, before, strict=True):
            new_a, new_b = (factor.detach().double() for factor in pair.matrices(pair.a, pair.b))
            if not b.any() or (case.method == "balora" and not pair.possible):
                assert torch.equal(new_a, a) and torch.equal(new_b, b)
                continue
            tolerance = 4 * max(_TOLERANCE[pair.a.dtype], _TOLERANCE[pair.b.dtype])
            assert abs(float(new_a.norm() / new_b.norm()) - 1) <= tolerance
            scale = float(b.norm() * a.norm())
            assert float((new_b @ new_a - b @ a).norm()) <= tolerance * scale
