"""What the benchmarks time beside the package: baselines that agree with it, and wrong ones that are found out."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.harness import baselines, models, variants
from benchmarks.harness.interleaved import run_step
from benchmarks.harness.workloads import OptimizerStep, TrainingStep
from reflora_dist.methods import reference
from tests.support.cluster import run_ranks

SHAPE = models.ModelShape(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_key_value_heads=2, vocab_size=64
)


def test_the_formula_is_that_of_the_oracle() -> None:
    torch.manual_seed(0)
    lora_a, lora_b = torch.randn(5, 40, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    expected = reference.refactorization(lora_a, lora_b)
    assert expected is not None
    for solve in (baselines.solve_as_published, baselines.solve_batched):
        solution = solve((lora_a @ lora_a.mT)[None], (lora_b.mT @ lora_b)[None])
        for matrix, wanted in zip(solution, expected, strict=True):
            # the Grams of these well-conditioned factors cost a few digits of float64
            torch.testing.assert_close(matrix[0], wanted, rtol=1e-9, atol=1e-11)


def _check(rank: int, world_size: int, engine: str, lora_rank: int, names: list[str], broken: str) -> Any:
    """Errors of the variants, or the message with which one of them is refused."""
    if broken == "solver":
        right = baselines.solve_as_published
        baselines.solve_as_published = lambda gram_a, gram_b: right(gram_a, gram_b)[::-1]
    elif broken == "place":
        baselines.GatheredPairs._keep_own = lambda *_: None  # type: ignore[method-assign]
    elif broken == "everything":
        variants._BASELINES["loop"] = lambda engine: lambda: None
    workload = OptimizerStep(SHAPE, lora_rank, torch.device("cpu"), engine)

    def run_step() -> None:
        workload.prepare()
        workload.step()

    parameters = [parameter for parameter in workload.trainee.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        errors = variants.check_same_result(engine, names, workload.trainee, run_step)
    except RuntimeError as error:
        return str(error)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True)), "a check must not train"
    return errors


# flat, r = 5 does not divide evenly, and with r = 2 the third rank holds nothing of lora_A; tall, 32 rows are no
# multiple of 3
GATHERED = [
    ("fsdp2", 2, 4),
    ("fsdp2", 3, 5),
    ("fsdp2-flat", 2, 4),
    ("fsdp2-flat", 2, 5),
    ("fsdp2-flat", 3, 2),
    ("fsdp2-shard1", 2, 4),
]


def _check_all(rank: int, world_size: int) -> dict[tuple[str, int], Any]:
    cases = [(engine, lora_rank) for engine, ranks, lora_rank in GATHERED if ranks == world_size]
    return {case: _check(rank, world_size, *case, ["reflora", "gather-each"], "") for case in cases}


@functools.cache
def _checked(world_size: int) -> list[dict[tuple[str, int], Any]]:
    """Of every rank, for every case on this number of ranks."""
    return run_ranks(_check_all, world_size)


@pytest.mark.parametrize(("engine", "world_size", "lora_rank"), GATHERED)
def test_gathering_agrees_with_the_package(engine: str, world_size: int, lora_rank: int) -> None:
    for errors in (checked[engine, lora_rank] for checked in _checked(world_size)):
        assert len(errors) == 2 and max(errors.values()) < 1e-5


def _gathered_rows_that_are_cut(rank: int, world_size: int, engine: str) -> dict[str, float]:
    workload = TrainingStep(engine, SHAPE, 5, torch.device("cpu"), micro_batch_size=1, seq_len=8)
    engine_found = variants.innermost_engine(workload.trainee)
    moving = [layout.columns for layout in engine_found.layouts() if layout.moves]
    assert moving and any(moving) == engine.endswith("-flat")
    return variants.check_same_result(engine, ["reflora", "gather-each"], workload.trainee, lambda: run_step(workload))


@pytest.mark.parametrize("engine", ["zero3", "zero3-flat"])
def test_gathering_agrees_where_rows_are_cut(engine: str) -> None:
    for errors in run_ranks(_gathered_rows_that_are_cut, 3, engine):
        assert len(errors) == 2 and max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("engine", "world_size", "names", "broken", "message"),
    [
        ("single", 1, ["reflora"], "solver", "reflora and loop disagree"),
        ("fsdp2", 2, ["gather-each"], "solver", "gather-each and gather-coalesced disagree"),
        ("fsdp2", 2, ["reflora"], "place", "hardly changes the gradients"),
        ("single", 1, ["reflora"], "everything", "hardly changes the gradients"),
    ],
)
def test_a_wrong_variant_is_found_out(
    engine: str, world_size: int, names: list[str], broken: str, message: str
) -> None:
    for found in run_ranks(_check, world_size, engine, 4, names, broken):
        assert isinstance(found, str) and message in found


def _riemannian(rank: int, world_size: int) -> list[bool]:
    workload = OptimizerStep(SHAPE, 4, torch.device("cpu"), "single")
    gradients = [parameter.grad for parameter in workload.trainee.model.parameters() if parameter.grad is not None]
    changed = []
    for name in ("riemannian", "lora"):
        workload.prepare()
        before = [gradient.clone() for gradient in gradients]
        with variants.installed(name, workload.trainee):
            workload.step()
        changed.append(not any(torch.equal(g, b) for g, b in zip(gradients, before, strict=True)))
    return changed


def test_pefts_optimizer_acts_while_it_is_installed_and_not_after() -> None:
    pytest.importorskip("peft.optimizers.riemannian")
    assert run_ranks(_riemannian, 1) == [[True, False]]


def _unapplied(rank: int, world_size: int) -> str:
    workload = OptimizerStep(SHAPE, 4, torch.device("cpu"), "single")
    for name, parameter in workload.trainee.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # S does not exist
    try:
        with variants.installed("reflora", workload.trainee), variants.without_updates(workload.trainee):
            workload.prepare()
            workload.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_method_that_skips_pairs_is_not_timed() -> None:
    (message,) = run_ranks(_unapplied, 1)
    assert "did not act on every pair in every step" in message
