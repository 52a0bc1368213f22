"""The toy problem: gradients are right, products do not depend on the factorization, and the record is complete."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import matrix_factorization as toy
from benchmarks.harness.engines import single_process_device
from benchmarks.reports.matrix_factorization import markdown, plot
from tests.support.launchers import launch

CPU = torch.device("cpu")
SCRIPT = "benchmarks/matrix_factorization.py"
PLOTTED, ILL_CONDITIONED, BALANCED = toy.PROBLEMS


def small(**changes: Any) -> toy.Arguments:
    return toy.Arguments(**{"size": 12, "lora_rank": 3, "iterations": 20, "seeds": [0, 1], **changes})


def descend(method: str, problem: toy.Problem, rate: float, change: torch.Tensor | None = None) -> Any:
    target, a, b = (tensor[None] for tensor in toy.make(problem, 0, 12, 3, CPU))
    if change is not None:
        a, b = change @ a, b @ change.inverse()
    return toy.descend(method, target, a, b, torch.tensor([rate], dtype=torch.float64), iterations=20)


@pytest.mark.parametrize("method", toy.METHODS)
def test_the_loss_falls_at_a_small_rate(method: str) -> None:
    losses, product = descend(method, BALANCED, rate=0.005)
    assert bool((losses.diff(dim=1) < 0).all())
    target = toy.make(BALANCED, 0, 12, 3, CPU)[0]
    assert float(losses[0, -1]) == pytest.approx(0.5 * float((product[0] - target).square().sum()))


@pytest.mark.parametrize("method", toy.INVARIANT)
def test_products_do_not_depend_on_the_factorization(method: str) -> None:
    change = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses, product = descend(method, PLOTTED, rate=0.005)
    other_losses, other = descend(method, PLOTTED, rate=0.005, change=change)
    torch.testing.assert_close(other, product, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(other_losses, losses, rtol=1e-7, atol=0)


def test_plain_gradient_descent_depends_on_the_factorization() -> None:
    """Otherwise the test above would prove nothing."""
    change = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    _, product = descend("lora", PLOTTED, rate=0.005)
    _, other = descend("lora", PLOTTED, rate=0.005, change=change)
    assert float((other - product).abs().max()) > 0.1


def test_lora_follows_the_gradient() -> None:
    target, a, b = toy.make(PLOTTED, 0, 12, 3, CPU)
    a.requires_grad_(), b.requires_grad_()
    (0.5 * (b @ a - target).square().sum()).backward()
    assert a.grad is not None and b.grad is not None
    rate = torch.tensor([0.01], dtype=torch.float64)
    _, product = toy.descend("lora", target[None], a.detach()[None], b.detach()[None], rate, iterations=1)
    torch.testing.assert_close(product[0], (b - 0.01 * b.grad).detach() @ (a - 0.01 * a.grad).detach())


def test_the_check_catches_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toy.check(small(), CPU)["reference_error"] < 1e-10
    right = toy.solve_refactorization
    monkeypatch.setattr(toy, "solve_refactorization", lambda a, b: (1.001 * right(a, b)[0], *right(a, b)[1:]))
    with pytest.raises(AssertionError, match="off the plain method's"):
        toy.check(small(), CPU)


def test_the_check_catches_a_rule_that_sees_the_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "INVARIANT", ("lora",))
    with pytest.raises(AssertionError, match="lora's products depend on the factorization"):
        toy.check(small(), CPU)


def test_a_diverged_run_stays_infinite_and_is_counted() -> None:
    losses, _ = descend("lora", PLOTTED, rate=50.0)
    assert math.isinf(float(losses[0, -1])) and not bool(torch.isnan(losses).any())
    entry = toy.summary(losses, rate=50.0, target=1e-6)
    assert entry["final_loss"]["median"] is None and entry["steps_to_target"] == [None]
    assert entry["diverged_seeds"] == 1


def test_summary_and_choice_of_the_best_rate() -> None:
    losses = torch.tensor([[8.0, 4.0, 1.0], [8.0, 1.0, 0.5], [8.0, 8.0, 8.0]], dtype=torch.float64)
    slow = toy.summary(losses, rate=0.1, target=0.25)
    assert slow["steps_to_target"] == [2.0, 1.0, None] and slow["final_loss"]["median"] == 1.0
    fast = toy.summary(losses[1:2].expand(3, -1), rate=0.2, target=0.25)
    picked = toy.pick([slow, fast])
    assert picked["best_learning_rate"] == 0.2 and not picked["best_inside_grid"]


def test_the_script_writes_a_record_that_the_report_renders(tmp_path: Path) -> None:
    output = tmp_path / "toy.json"
    sizes = ["--size", "12", "--lora_rank", "3", "--iterations", "20", "--seeds", "0", "1"]
    options = [*sizes, "--learning_rates", "0.005", "0.02", "0.1"]
    text = launch([sys.executable, SCRIPT, *options, "--output", output], timeout_s=300)
    record = json.loads(output.read_text())
    assert record["benchmark"] == "matrix_factorization" and record["arguments"]["seeds"] == [0, 1]
    assert markdown(record) in text
    assert len(plot(record).axes) == len(toy.PROBLEMS)
    for problem in record["results"]["problems"]:
        assert list(problem["methods"]) == list(toy.METHODS)
        first = {m["rates"]["0.01"]["losses"]["median"][0] for m in problem["methods"].values()}
        assert len(first) == 1, "all methods start at the same loss"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_rank": 13}, "lora_rank=13 must lie between 1 and size=12"),
        ({"iterations": 0}, "--iterations 0 must be positive"),
        ({"target": 1.0}, r"target=1\.0"),
        ({"seeds": [0, 0]}, r"seeds=\[0, 0\]"),
        ({"learning_rates": [-0.1]}, "learning_rates="),
    ],
)
def test_bad_input_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_launcher_with_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*without a launcher"):
        single_process_device("run it without a launcher")
