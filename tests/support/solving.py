"""Steps of layouts of any kind, ranks being threads, and what they should do to the gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reflora_dist import RefLoRAConfig
from reflora_dist.collectives.retile import Retiler
from reflora_dist.collectives.tiling import Layout
from reflora_dist.engines.base import Firing
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.gradient_step import GradientStep
from reflora_dist.step.solver import Solver
from tests.support import oracles
from tests.support.threads import ThreadRank, run_threads

CPU = torch.device("cpu")


def stepped(
    layouts: list[Layout],
    ranks: int,
    method: str = "reflora",
    firings: int = 1,
    device: torch.device = CPU,
    steps: int = 1,
) -> Any:
    """Gradients as steps of all ranks leave them, each refactoring those of the one before, in PEFT's orientation.

    With two firings, those of the first half of the factors come first. Returns them, what they should be, every
    rank's calls in the last step, and whether every rank ended with the same Grams, bit for bit.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(layout.shape, generator=generator) for layout in layouts]
    gradients = []
    for pair in range(0, len(layouts), 2):  # by the chain rule, from the gradient of the whole weight
        lora_a, lora_b = as_peft(layouts, weights)[pair : pair + 2]
        whole = torch.randn(len(lora_b), lora_a.shape[1], generator=generator)
        of_a, of_b = 2.0 * lora_b.T @ whole, 2.0 * whole @ lora_a.T
        gradients += [of_a if layouts[pair].columns else of_a.T.contiguous(), of_b]
    config = RefLoRAConfig(method=method, warmup_steps=0)
    lora_ranks = [layout.lora_rank for layout in layouts[::2]]
    scalings = [2.0] * len(lora_ranks)

    def pieces(tensors: list[Tensor], rank: int) -> list[Tensor]:
        held = zip(tensors, (layout.piece(rank) for layout in layouts), strict=True)
        return [tensor.flatten()[piece.start : piece.stop].clone().to(device) for tensor, piece in held]

    def run(comm: ThreadRank) -> Any:
        own_weights, own_gradients = pieces(weights, comm.rank), pieces(gradients, comm.rank)
        engine: Any = SimpleNamespace(
            pairs=[SimpleNamespace(lora_rank=r, scaling=2.0, experts=1) for r in lora_ranks],
            weights=lambda: own_weights,
            gradients=lambda: own_gradients,
            has_half_gradients=lambda: False,
        )
        kind = METHODS[method]
        solver = Solver(kind, config, scalings, lora_ranks, comm)
        step = GradientStep(engine, Retiler(layouts, comm), comm, solver, kind.uses_gradients, carries_moments=False)
        halves = [range(len(layouts))]
        if firings == 2:
            halves = [range(len(layouts) // 2), range(len(layouts) // 2, len(layouts))]
        for _ in range(steps):
            comm.start_step()
            for number, half in enumerate(halves):
                present = tuple(factor in half for factor in range(len(layouts)))
                step(Firing(present, first=number == 0, last=number == len(halves) - 1), {})
        return [gradient.cpu() for gradient in own_gradients], comm.calls, step.grams

    results = run_threads(run, ranks, device)
    found = []
    for factor, layout in enumerate(layouts):
        found.append(torch.cat([results[rank][0][factor] for rank in range(ranks)]).view(layout.shape))
    found, expected = as_peft(layouts, found), [gradient.double() for gradient in as_peft(layouts, gradients)]
    factors = as_peft(layouts, weights)
    for _ in range(steps):
        for a in range(0, len(layouts), 2):
            expected[a : a + 2] = oracles.new_gradients(config, *factors[a : a + 2], *expected[a : a + 2], scaling=2.0)
    grams = [of_rank for _, _, of_rank in results]
    equal = all(torch.equal(other[r], both) for other in grams for r, both in grams[0].items())
    return found, expected, [calls for _, calls, _ in results], equal


def as_peft(layouts: list[Layout], tensors: list[Tensor]) -> list[Tensor]:
    """lora_A as ``[r, in]``, however it is stored."""
    stored = enumerate(zip(tensors, layouts, strict=True))
    return [tensor if layout.columns or factor % 2 else tensor.T for factor, (tensor, layout) in stored]
