"""ScaledGD and LoRA-Pro against what defines them and against PEFT."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.methods import lora_pro
from reflora_dist.methods.scaled_gd import ScaledGD
from tests.support import oracles
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES, accelerated
from tests.support.engines_under_test.common import optimizer_of
from tests.support.matrices import factor, positive_definite, relative
from tests.support.small import backward, small_batches, small_model, train_small, trainable
from tests.support.workloads import (
    FACTOR_TOLERANCE,
    Factors,
    Settings,
    build_model,
    named_factors,
    synthetic_workload,
    train_single,
    worst_factor_error,
)

EXAMPLES = settings(max_examples=40, deadline=None)
IMMEDIATELY = RefLoRAConfig(method="lora-pro", warmup_steps=0)

# --- ScaledGD ---


@pytest.mark.parametrize("from_zero", [False, True], ids=["random", "B=0"])
@pytest.mark.parametrize("damping", [1e-2, 0.5])
@pytest.mark.parametrize(("kind", "lr"), [(torch.optim.AdamW, 0.02), (torch.optim.SGD, 0.02)])
def test_scaled_gd_equals_pefts_optimizer(kind: Any, lr: float, damping: float, from_zero: bool) -> None:
    """On one process, where PEFT's works, in float64 and to rounding."""
    model = small_model(from_zero=from_zero)
    expected = train_small(model, create_riemannian_optimizer(model, kind, lr=lr, reg=damping), small_batches(6))
    model = small_model(from_zero=from_zero)
    optimizer = kind(trainable(model), lr=lr)
    handle = attach(model, optimizer, RefLoRAConfig(method="scaled-gd", damping=damping))
    factors = train_small(model, optimizer, small_batches(6))
    assert handle.report().applied_steps == 6 and handle.report().skipped_pairs == 0
    assert worst_factor_error(factors, expected) < 1e-9
    plain = small_model(from_zero=from_zero)
    assert worst_factor_error(train_small(plain, kind(trainable(plain), lr=lr), small_batches(6)), expected) > 1e-3


def _pefts_and_ours(rank: int, world_size: int) -> dict[str, Factors]:
    """Under accelerate's FSDP2: plain AdamW, PEFT's preconditioned one, and ours."""
    workload = synthetic_workload(steps=3)
    trained: dict[str, Factors] = {}
    for name in ("plain", "peft", "ours"):
        seen: list[Any] = []

        def to_prepare(model: Any, settings: Settings, name: str = name) -> torch.optim.Optimizer:
            if name != "peft":
                return optimizer_of(model, settings)
            return create_riemannian_optimizer(model, torch.optim.AdamW, **settings.adamw())

        def attached(model: Any, optimizer: Any, name: str = name, seen: list[Any] = seen) -> None:
            seen.append(type(optimizer.optimizer).__name__)
            if name == "ours":
                attach(model, optimizer, RefLoRAConfig(method="scaled-gd"))

        accelerated.optimizer_of = to_prepare
        _, trained[name] = ENGINES["fsdp2-accelerate"].train(
            build_model(workload), workload.batches, Settings(), attached
        )
        assert seen == ["RiemannianPreconditionedOptimizer" if name == "peft" else "AdamW"]
    return trained


def test_pefts_optimizer_does_nothing_under_fsdp2_and_ours_does() -> None:
    """PEFT keeps the parameters from before sharding, whose gradients stay None: it trains plain AdamW in silence."""
    workload = synthetic_workload(steps=3)
    _, expected = oracles.trained_in_float64(workload, Settings(), RefLoRAConfig(method="scaled-gd"))
    model = build_model(workload)
    _, single = train_single(
        model,
        workload.batches,
        Settings(),
        optimizer=create_riemannian_optimizer(model, torch.optim.AdamW, **Settings().adamw()),
    )
    assert worst_factor_error(single, expected) < FACTOR_TOLERANCE  # where it works
    for trained in run_ranks(_pefts_and_ours, 2):
        assert worst_factor_error(trained["peft"], trained["plain"]) == 0.0
        assert worst_factor_error(trained["ours"], expected) < FACTOR_TOLERANCE
        assert worst_factor_error(trained["plain"], expected) > 1e-2


def test_scaled_gd_without_damping_leaves_a_deficient_pair_plain() -> None:
    """Two columns of B are parallel, so that its Gram's last pivot is nothing but rounding."""
    torch.manual_seed(0)
    config = RefLoRAConfig(method="scaled-gd", damping=0.0)
    deficient, regular = torch.randn(2, 12, 3, dtype=torch.float64)
    deficient[:, 2] = 1.7 * deficient[:, 1]
    gram_b = torch.stack([deficient.mT @ deficient, regular.mT @ regular])
    gram_a = torch.stack([regular.mT @ regular] * 2)
    transform = ScaledGD(config, {}).solve({3: torch.stack([gram_a, gram_b])})
    assert transform.solved[3].tolist() == [False, True]
    assert torch.equal(transform.matrices[3][0][0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(transform.matrices[3][0][1] @ gram_b[1], torch.eye(3, dtype=torch.float64))


def test_scaled_gd_without_damping_leaves_a_singular_pair_plain() -> None:
    """From B = 0 with delta = 0 there is no inverse: the step is AdamW's, and is counted."""
    ends = []
    for attaches in (True, False):
        model = small_model(from_zero=True)
        optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
        if attaches:
            handle = attach(model, optimizer, RefLoRAConfig(method="scaled-gd", damping=0.0))
        ends.append(train_small(model, optimizer, small_batches(1)))
    assert handle.report().skipped_pairs == 2
    assert worst_factor_error(*ends) == 0.0


@pytest.mark.parametrize("damping", [-1e-3, float("inf"), float("nan")])
def test_damping_is_checked(damping: float) -> None:
    with pytest.raises(ValueError, match=r"damping=.* must be a number of at least 0, and finite"):
        RefLoRAConfig(method="scaled-gd", damping=damping)


# --- LoRA-Pro ---


class Pair:
    """A pair, the gradient G of the whole weight, and what the chain rule and LoRA-Pro make of it."""

    def __init__(
        self, seed: int, r: int, rows: tuple[int, int], condition: float, scaling: float, of_a: float | None = None
    ) -> None:
        self.scaling = scaling
        self.lora_a = factor(rows[0], r, condition if of_a is None else of_a, seed).mT
        self.lora_b = 0.3 * factor(rows[1], r, condition, seed + 1)
        self.gradient = torch.randn(rows[1], rows[0], generator=torch.Generator().manual_seed(seed)).double()
        self.old = (scaling * self.lora_b.mT @ self.gradient, scaling * self.gradient @ self.lora_a.mT)
        grams = []
        for tall, grad in ((self.lora_a.mT, self.old[0].mT), (self.lora_b, self.old[1])):
            both = torch.cat([tall, grad], dim=1)
            grams.append((both.mT @ both)[None])
        scalings = {r: torch.tensor([scaling], dtype=torch.float64)}
        matrices, solved = lora_pro.LoRAPro(IMMEDIATELY, scalings).solve({r: torch.stack(grams)})
        of_a, of_b = matrices[r][:, 0]
        self.solved = bool(solved[r])
        self.new = (
            of_a.mT @ torch.cat([self.lora_a, self.old[0]]),
            torch.cat([self.lora_b, self.old[1]], dim=1) @ of_b,
        )

    def product(self, grads: tuple[Tensor, Tensor]) -> Tensor:
        """``s B gA + s gB A``: what a step does to the whole weight."""
        return self.scaling * (self.lora_b @ grads[0] + grads[1] @ self.lora_a)

    def change(self, grads: tuple[Tensor, Tensor]) -> float:
        return float(sum((new - old).square().sum() for new, old in zip(grads, self.old, strict=True)))

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The new gradients with another X."""
        return self.new[0] + x @ self.lora_a, self.new[1] - self.lora_b @ x


@st.composite
def pro_pairs(draw) -> Pair:
    r = draw(st.integers(1, 5))
    rows = (draw(st.integers(r, 12)), draw(st.integers(r, 12)))
    return Pair(
        draw(st.integers(0, 2**31)), r, rows, 10 ** draw(st.floats(0, 2)), draw(st.sampled_from([0.25, 1.0, 2.0, 16.0]))
    )


@EXAMPLES
@given(pro_pairs())
def test_lora_pros_step_is_the_best_approximation_of_the_whole_gradient(pair: Pair) -> None:
    """Brute force: least squares over all entries of dA and dB together gives the same product."""
    out, columns = pair.gradient.shape
    eye_in, eye_out = (torch.eye(size, dtype=torch.float64) for size in (columns, out))
    # row-major vec(B dA + dB A) = kron(B, I) vec(dA) + kron(I, A^T) vec(dB)
    matrix = pair.scaling * torch.cat([torch.kron(pair.lora_b, eye_in), torch.kron(eye_out, pair.lora_a.mT)], dim=1)
    solution = torch.linalg.pinv(matrix, rtol=1e-12) @ pair.gradient.flatten()
    best = (matrix @ solution).view_as(pair.gradient)
    assert pair.solved
    assert relative(pair.product(pair.new), best) < 1e-8


@EXAMPLES
@given(pro_pairs(), st.integers(0, 2**31))
def test_lora_pros_x_keeps_the_gradients_closest(pair: Pair, seed: int) -> None:
    """Any other X gives the same product and is farther from the old gradients."""
    r = pair.lora_a.shape[0]
    x = torch.randn(r, r, generator=torch.Generator().manual_seed(seed)).double()
    for size in (1e-2, 1.0):
        other = pair.moved(size * x)
        assert relative(pair.product(other), pair.product(pair.new)) < 1e-10
        assert pair.change(other) > pair.change(pair.new)


@EXAMPLES
@given(pro_pairs())
def test_lora_pro_equals_its_oracle(pair: Pair) -> None:
    """The sign iteration gives what eigenvectors give."""
    expected = oracles.lora_pro(pair.lora_a, pair.lora_b, *pair.old, pair.scaling)
    for value, exact in zip(pair.new, expected, strict=True):
        assert float((value - exact).norm()) < 1e-7 * max(float(exact.norm()), float(pair.old[0].norm()))


def test_lora_pro_keeps_nothing_of_full_size() -> None:
    """After a step optimizer, handle and gradients hold tensors of the factors' sizes and less: none is [out, in]."""
    sizes = {(300, 200), (200, 300)}

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(200, 300)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model = get_peft_model(Wide(), LoraConfig(r=4, target_modules=["first"], init_lora_weights=False))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    handle = attach(model, optimizer, IMMEDIATELY)
    model(torch.randn(5, 200)).square().mean().backward()
    optimizer.step()
    assert handle.report().applied_steps == 1 and handle.report().skipped_pairs == 0
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    full = [t for t in gc.get_objects() if isinstance(t, Tensor) and tuple(t.shape) in sizes and id(t) not in frozen]
    assert not full
    for state in optimizer.state.values():
        assert all(value.numel() <= 4 * 300 for value in state.values())


@pytest.mark.parametrize("case", ["B = 0", "dead row of A", "dead column of B", "nan gradient of its neighbour"])
def test_lora_pro_leaves_a_deficient_pair_plain(case: str) -> None:
    """Skipped, counted, and updated as plain AdamW; the other pair is not disturbed."""
    batch = small_batches(1)[0]
    ends, oracle_ends = [], None
    for attaches in (True, False):
        model = small_model()
        first_a, first_b, second_a, _ = oracles.factors_in_pairs(model)
        with torch.no_grad():
            if case == "B = 0":
                first_b.zero_()
            elif case == "dead row of A":
                first_a[1] = 0
            else:
                first_b[:, 2] = first_b[:, 0]
        optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
        if attaches:
            handle = attach(model, optimizer, IMMEDIATELY)
        backward(model, batch)
        if case.startswith("nan"):
            second_a.grad[0, 0] = float("nan")
        if attaches:
            grads = [f.grad.clone() for f in oracles.factors_in_pairs(model)]
            second = [f.detach().clone() for f in oracles.factors_in_pairs(model)[2:]]
            oracle_ends = oracles.lora_pro(*second, *grads[2:], 2.0)
        optimizer.step()
        if attaches:
            after = [f.grad.clone() for f in oracles.factors_in_pairs(model)]
            assert all(torch.equal(x, y) for x, y in zip(grads[:2], after[:2], strict=True))
            if not case.startswith("nan"):
                assert all(relative(x, y) < 1e-9 for x, y in zip(after[2:], oracle_ends, strict=True))
        ends.append([f.detach().clone() for f in oracles.factors_in_pairs(model)[:2]])
    assert handle.report().skipped_pairs == (2 if case.startswith("nan") else 1)
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_lora_pro_with_ill_conditioned_factors_is_exact_or_skipped() -> None:
    """cond 1e4 in both factors is solved; at 1e9, which a Gram does not resolve, the pair is left alone."""
    fine = Pair(3, 4, (40, 30), 1e4, 2.0)
    expected = oracles.lora_pro(fine.lora_a, fine.lora_b, *fine.old, 2.0)
    assert fine.solved and relative(fine.product(fine.new), fine.product(expected)) < 1e-4
    for of_a, of_b in ((1e9, 1e9), (1e9, 2.0), (2.0, 1e9)):
        beyond = Pair(3, 4, (40, 30), of_b, 2.0, of_a)
        assert not beyond.solved
        assert all(torch.equal(new, old) for new, old in zip(beyond.new, beyond.old, strict=True))


@EXAMPLES
@given(
    st.integers(1, 16),
    st.integers(0, 2**31),
    st.tuples(*[st.floats(0, 8)] * 2),
    st.tuples(*[st.floats(-6, 6)] * 2),
)
def test_sylvester_equation(r: int, seed: int, log_conditions: Any, log_scales: Any) -> None:
    """Over condition numbers up to 1e8 and scales apart by up to 1e12 the solution satisfies its equation."""
    p, q = (
        positive_definite(r, 10**condition, seed + i, 10**scale)
        for i, (condition, scale) in enumerate(zip(log_conditions, log_scales, strict=True))
    )
    c = torch.randn(r, r, generator=torch.Generator().manual_seed(seed)).double()
    x, residual = lora_pro.solve_sylvester(p[None], q[None], c[None])
    values_p, vectors_p = torch.linalg.eigh(p)
    values_q, vectors_q = torch.linalg.eigh(q)
    exact = vectors_p @ ((vectors_p.mT @ c @ vectors_q) / (values_p[:, None] + values_q)) @ vectors_q.mT
    rounding = 1e-14 * float((p.norm() + q.norm()) * x.norm() / c.norm())
    assert float(residual) == pytest.approx(float((p @ x[0] + x[0] @ q - c).norm() / c.norm()), abs=rounding)
    # an error of X is the equation's, divided by the least eigenvalue
    amplification = float((values_p[-1] + values_q[-1]) / (values_p[0] + values_q[0]).clamp_min(1e-300))
    assert relative(x[0], exact) < 1e-13 * max(10.0, amplification)


def test_sylvester_with_no_right_side() -> None:
    p = positive_definite(4, 10.0, 0, 1.0)[None]
    x, residual = lora_pro.solve_sylvester(p, p, torch.zeros_like(p))
    assert not x.any() and float(residual) == 0.0


def test_small_networks_factors_are_named_as_peft_does() -> None:
    """`named_factors` and `factors_in_pairs` list the same parameters."""
    model = small_model()
    assert {id(f) for f in named_factors(model).values()} == {id(f) for f in oracles.factors_in_pairs(model)}
