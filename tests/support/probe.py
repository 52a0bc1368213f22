"""Looks at whole gradients right before and right after the refactorization, under any engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reflora_dist import Handle, RefLoRAConfig, attach
from reflora_dist.methods.reference import refactored
from tests.support.engines_under_test.common import Wrapped, train_on, world_size


@dataclasses.dataclass
class Refactoring:
    """One step seen whole: per pair the factors as stored, gradients before and after, all float64."""

    weights: list[tuple[Tensor, Tensor]]
    before: list[tuple[Tensor, Tensor]]
    after: list[tuple[Tensor, Tensor]]

    def worst_error(self) -> float:
        """The largest ||g - exact|| / ||exact|| (Frobenius) over all gradients."""
        errors = []
        for (lora_a, lora_b), before, after in zip(self.weights, self.before, self.after, strict=True):
            for value, exact in zip(after, refactored(lora_a, lora_b, *before), strict=True):
                errors.append(float(torch.linalg.norm(value - exact) / torch.linalg.norm(exact)))
        return max(errors)

    def changed(self) -> list[bool]:
        """Per pair whether its gradients were touched at all."""
        return [not torch.equal(x[0], y[0]) for x, y in zip(self.before, self.after, strict=True)]


def refactoring_of_one_step(wrapped: Wrapped, batch: Tensor, config: RefLoRAConfig) -> tuple[Refactoring, Handle]:
    """Attach, take one step, and return what the optimizer would have read and what it did read."""
    seen: dict[str, Any] = {"weights": {}, "before": {}, "after": {}}
    handle = attach(wrapped.model, wrapped.optimizer, config)
    engine = handle._engine

    def collect(where: str) -> None:
        present = engine.firing().present
        with torch.no_grad():
            # Every rank takes part in the gathering of every factor that this firing has.
            gradients = _whole(engine, [g if p else None for g, p in zip(engine.gradients(), present, strict=True)])
            if where == "before" and not seen["weights"]:
                seen["weights"] = _whole(engine, engine.weights())
        seen[where].update({key: value for key, value in gradients.items() if present[key]})

    # Hooks run in the order of their registration; the first of these is moved before the handle's.
    first = engine.optimizer.register_step_pre_hook(lambda *_: collect("before"))
    engine.optimizer._optimizer_step_pre_hooks.move_to_end(first.id, last=False)
    engine.optimizer.register_step_pre_hook(lambda *_: collect("after"))
    train_on(wrapped, batch)
    return Refactoring(*(_pairs(seen[key]) for key in ("weights", "before", "after"))), handle


def _pairs(by_factor: dict[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(by_factor[index], by_factor[index + 1]) for index in range(0, len(by_factor), 2)]


def _whole(engine: Any, local: list[Tensor | None]) -> dict[int, Tensor]:
    """Put the local parts of all ranks together, by what each engine says about where they lie; as PEFT stores them."""
    layouts = engine.layouts()
    mine = [None if tensor is None else tensor.double().cpu().clone() for tensor in local]
    everyone: list[Any] = [mine]
    if engine.group is not None and world_size() > 1:
        everyone = [None] * dist.get_world_size(engine.group)
        dist.all_gather_object(everyone, mine, group=engine.group)
    whole = {}
    for index, layout in enumerate(layouts):
        parts = []
        for rank, of_rank in enumerate(everyone):
            numel = layout.piece(rank).numel
            part = torch.zeros(numel, dtype=torch.float64) if of_rank[index] is None else of_rank[index]
            assert part.numel() == numel
            parts.append(part.reshape(layout.lora_rank, -1) if layout.by_rows and layout.columns else part.reshape(-1))
        stored = torch.cat(parts, dim=-1).reshape(layout.shape)
        whole[index] = stored.t() if index % 2 == 0 and not layout.columns else stored
    return whole
