"""The toy problem of the RefLoRA paper: factorize a low-rank matrix by plain gradient descent on its factors.

    python benchmarks/matrix_factorization.py

``min 1/2 |B A - M|_F^2`` over A ``[r, n]`` and B ``[n, r]``, without momentum or Adam, under three rules:

    lora        A <- A - lr grad_A               B <- B - lr grad_B
    scaled-gd   A <- A - lr (B^T B)^-1 grad_A    B <- B - lr grad_B (A A^T)^-1    (Tong, Ma and Chi, JMLR 2021)
    reflora     A <- A - lr S^-1 grad_A          B <- B - lr grad_B S             with S (A A^T) S = B^T B

Each rule runs at the paper's two learning rates and at its own best rate of one common grid. The published repository
holds the paper's plot (assets/MF-loss.png) but not the program. The sizes of the problem "like the published plot" are
chosen so that plain gradient descent behaves as in that plot: it starts at a loss of 1500, is slow at 0.01 and diverges
at 0.03. Each of the two other problems changes one thing: the condition number of M, or the balance of the start.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.options import parse, require_positive
from reflora_dist.command_line.help import answer_help


def _default_rates() -> list[float]:
    return [round(0.005 * 2 ** (k / 2), 6) for k in range(16)]


@dataclasses.dataclass
class Arguments:
    """Sizes of the problem and of the search for each method's best learning rate."""

    size: int = dataclasses.field(default=100, metadata={"help": "n: M is n x n"})
    lora_rank: int = dataclasses.field(default=8, metadata={"help": "r: rank of M and of its factors"})
    iterations: int = dataclasses.field(default=100, metadata={"help": "steps of every run"})
    seeds: list[int] = dataclasses.field(default_factory=lambda: list(range(10)), metadata={"help": "one run each"})
    learning_rates: list[float] = dataclasses.field(
        default_factory=_default_rates, metadata={"help": "grid of the search, besides the paper's rates"}
    )
    target: float = dataclasses.field(default=1e-6, metadata={"help": "solved: this share of the first loss"})
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        if not 1 <= self.lora_rank <= self.size:
            raise ValueError(f"lora_rank={self.lora_rank} must lie between 1 and size={self.size}")
        require_positive(self, "iterations")
        if not 0 < self.target < 1:
            raise ValueError(f"target={self.target} must lie between 0 and 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be at least one number, each only once")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates={self.learning_rates} must be at least one number, all above 0")


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

import torch
from torch import Tensor

from benchmarks.harness import engines, recording
from benchmarks.reports.matrix_factorization import markdown
from reflora_dist.algebra.refactorization import solve_refactorization
from reflora_dist.methods.reference import refactored

METHODS = ("lora", "scaled-gd", "reflora")
INVARIANT = ("scaled-gd", "reflora")  # these rules depend on the product alone, not on its factors
PAPER_RATES = (0.01, 0.03)
QUARTILES = {"q1": 0.25, "median": 0.5, "q3": 0.75}
START_LOSS = 1500.0  # where the curves of the published plot begin
# float64 rounding, amplified by the condition number of the change of factorization, over the steps compared
DRIFT_LIMIT = 1e-6


@dataclasses.dataclass(frozen=True)
class Problem:
    """M has r singular values between the largest and 1/condition_number of it. A and B start as normal noise."""

    name: str
    condition_number: float
    start_std_a: float
    start_std_b: float


PROBLEMS = (
    Problem("like the published plot", condition_number=2.0, start_std_a=1.0, start_std_b=0.01),
    Problem("ill-conditioned", condition_number=10.0, start_std_a=1.0, start_std_b=0.01),
    Problem("balanced start", condition_number=2.0, start_std_a=0.1, start_std_b=0.1),
)


def main() -> None:
    arguments = parse(Arguments)
    device = engines.single_process_device("the whole benchmark takes seconds: run it without a launcher")
    checks = check(arguments, device)
    results = {"checks": checks, "problems": [measure(problem, arguments, device) for problem in PROBLEMS]}
    recording.publish("matrix_factorization", arguments, device, results, markdown)


def make(problem: Problem, seed: int, size: int, lora_rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return M ``[n, n]``, A ``[r, n]`` and B ``[n, r]`` of one seed, float64. ``|M|_F^2 / 2`` is START_LOSS."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = (torch.linalg.qr(noise(size, lora_rank)).Q for _ in range(2))
    singular = torch.logspace(0, -math.log10(problem.condition_number), lora_rank, dtype=torch.float64)
    singular = singular * math.sqrt(2 * START_LOSS) / torch.linalg.vector_norm(singular)
    a, b = problem.start_std_a * noise(lora_rank, size), problem.start_std_b * noise(size, lora_rank)
    return ((left * singular) @ right.mT).to(device), a.to(device), b.to(device)


def direction(method: str, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a method subtracts, without the rate. Arguments are batches ``[P, r, n]`` or ``[P, n, r]``."""
    gram_a, gram_b = a @ a.mT, b.mT @ b
    if method == "scaled-gd":
        # solve_ex does not raise for diverged runs
        scaled_a, _ = torch.linalg.solve_ex(gram_b, grad_a)
        scaled_b, _ = torch.linalg.solve_ex(gram_a, grad_b.mT)
        return scaled_a, scaled_b.mT
    if method == "reflora":
        s, s_inv, _ = solve_refactorization(gram_a, gram_b)
        return s_inv @ grad_a, grad_b @ s
    assert method == "lora", method
    return grad_a, grad_b


def descend(
    method: str, target: Tensor, a: Tensor, b: Tensor, learning_rates: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Run gradient descent on a batch of P runs.

    Args:
        method: one of METHODS.
        target: M, ``[P, n, n]``.
        a: ``[P, r, n]``.
        b: ``[P, n, r]``.
        learning_rates: ``[P]``.
        iterations: number of steps.

    Returns:
        losses ``[P, iterations + 1]``, infinite once a run has diverged, and the last products ``[P, n, n]``.
    """
    rate = learning_rates[:, None, None]
    losses = []
    for step in range(iterations + 1):
        error = b @ a - target
        losses.append(0.5 * error.square().sum(dim=(1, 2)))
        if step < iterations:
            step_a, step_b = direction(method, a, b, b.mT @ error, error @ a.mT)
            a, b = a - rate * step_a, b - rate * step_b
    stacked = torch.stack(losses, dim=1)
    diverged = (~torch.isfinite(stacked)).cummax(dim=1).values
    return stacked.masked_fill(diverged, math.inf), b @ a


def check(arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Compare reflora's step with the plain method's, and each rule's products from two factorizations of one start.

    Returns:
        ``reference_error``, and per method ``product_drift``: the relative distance of the products from ``(A, B)``
        and ``(X A, B X^-1)`` after 10 steps.

    Raises:
        AssertionError: a step differs from the plain method's, or a rule that depends only on the product drifts.
    """
    problem = PROBLEMS[-1]  # every rule is stable from a balanced start at the rate below
    target, a, b = make(problem, arguments.seeds[0], arguments.size, arguments.lora_rank, device)
    error = b @ a - target
    gradients = b.mT @ error, error @ a.mT
    plain = refactored(a, b, *gradients)
    batched = direction("reflora", *(tensor[None] for tensor in (a, b, *gradients)))
    reference_error = max(_distance(x[0], y) for x, y in zip(batched, plain, strict=True))
    assert reference_error < DRIFT_LIMIT, f"reflora's step is {reference_error:.1e} off the plain method's"

    # neither diagonal nor orthogonal, condition number about r
    change = torch.ones(arguments.lora_rank, arguments.lora_rank, dtype=torch.float64, device=device).tril()
    rate = torch.tensor([PAPER_RATES[0]], dtype=torch.float64, device=device)
    drift = {}
    for method in METHODS:
        _, product = descend(method, target[None], a[None], b[None], rate, iterations=10)
        _, other = descend(method, target[None], (change @ a)[None], (b @ change.inverse())[None], rate, iterations=10)
        drift[method] = _distance(other, product)
    for method in INVARIANT:
        assert drift[method] < DRIFT_LIMIT, f"{method}'s products depend on the factorization: {drift[method]:.1e}"
    return {"reference_error": reference_error, "product_drift": drift}


def _distance(x: Tensor, y: Tensor) -> float:
    return float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y))


def measure(problem: Problem, arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Run every method at every rate and seed of one problem."""
    made = [make(problem, seed, arguments.size, arguments.lora_rank, device) for seed in arguments.seeds]
    target, a, b = (torch.stack(parts) for parts in zip(*made, strict=True))
    rates = sorted({*arguments.learning_rates, *PAPER_RATES})
    methods = {}
    for method in METHODS:
        by_rate = []
        for rate in rates:
            batch = torch.full((len(made),), rate, dtype=torch.float64, device=device)
            losses, _ = descend(method, target, a, b, batch, arguments.iterations)
            by_rate.append(summary(losses.cpu(), rate, arguments.target))
        methods[method] = pick(by_rate)
    return {**dataclasses.asdict(problem), "methods": methods}


def summary(losses: Tensor, rate: float, target: float) -> dict[str, Any]:
    """Return median and quartiles over seeds of the losses ``[seeds, iterations + 1]``, and the steps to the target.

    A run that never reaches ``target`` times its first loss, or diverges later, counts as infinitely many steps. None
    stands for infinity.
    """
    levels = torch.tensor(list(QUARTILES.values()), dtype=losses.dtype)
    quartiles = torch.quantile(losses, levels, dim=0, interpolation="nearest")  # interpolating with infinity would fail
    reached = losses <= target * losses[:, :1]
    first = torch.where(reached.any(dim=1), reached.int().argmax(dim=1).double(), math.inf)
    first = torch.where(torch.isfinite(losses[:, -1]), first, math.inf)
    curves = {name: [_finite(x) for x in row] for name, row in zip(QUARTILES, quartiles.tolist(), strict=True)}
    return {
        "learning_rate": rate,
        "losses": curves,
        "final_loss": {name: curve[-1] for name, curve in curves.items()},
        "steps_to_target": [_finite(x) for x in first.tolist()],
        "diverged_seeds": int((~torch.isfinite(losses[:, -1])).sum()),
    }


def pick(by_rate: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries by rate, and the best rate: fewest steps to the target, then lowest final loss.

    The curves of the rates that are neither the paper's nor the best are dropped.
    """

    def score(entry: dict[str, Any]) -> tuple[float, float]:
        steps = [math.inf if x is None else x for x in entry["steps_to_target"]]
        last = entry["final_loss"]["median"]
        return statistics.median_low(steps), math.inf if last is None else last

    best = min(by_rate, key=score)["learning_rate"]
    rates = [entry["learning_rate"] for entry in by_rate]
    for entry in by_rate:
        if entry["learning_rate"] not in (*PAPER_RATES, best):
            del entry["losses"]
    return {
        "best_learning_rate": best,
        "best_inside_grid": min(rates) < best < max(rates),
        "rates": {f"{entry['learning_rate']:g}": entry for entry in by_rate},
    }


def _finite(value: float) -> float | None:
    """Round to five digits, more than any plot shows; None for infinity, which JSON does not have."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


if __name__ == "__main__":
    main()
