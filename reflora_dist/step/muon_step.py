"""The LoRA-Muon update of the factors, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives.communicator import Communicator
from ..collectives.grams import reduce_grams
from ..collectives.retile import Retiler
from ..engines.base import Engine, Firing
from ..methods.lora_muon import muon_update
from .muon_optimizer import LoRAMuon, decay_of
from .optimizer_step import OptimizerStep
from .own_blocks import block_set


class MuonStep(OptimizerStep):
    """The step of a LoRAMuon optimizer.

    Communication per step: one all-reduce of the Gram matrices of the factors and of their moments; two exchanges if
    factors move; for float16 factors one all-reduce of a flag per pair. None if every rank holds the factors whole.
    """

    def __init__(self, optimizer: LoRAMuon, engine: Engine, retiler: Retiler, communicator: Communicator) -> None:
        super().__init__(optimizer, engine, retiler, communicator)
        # on a GPU a set remembers the addresses of one list of blocks
        self._moment_blocks = block_set(engine, retiler.specs, communicator.device)
        self._scalings = [pair.scaling for pair in engine.pairs]
        inverses = [1 / abs(scaling) if scaling else 0.0 for scaling in self._scalings]
        self._inverse_scaling = {
            r: torch.tensor([inverses[pair] for pair in pairs], dtype=torch.float64, device=communicator.device)
            for r, pairs in self._blocks.pairs_by_rank.items()
        }

    def before_update(self, firing: Firing, *, due: bool, begins: bool) -> Tensor | None:
        if self._scalings != [pair.scaling for pair in self._engine.pairs]:
            raise RuntimeError("the adapters' scaling changed after attach(): detach, then attach again")
        return super().before_update(firing, due=due, begins=begins)

    def _settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["lr"]), decay_of(group["lr"], group["weight_decay"]), float(group["momentum"])

    def _update(self, gradients: list[Tensor | None]) -> dict[int, Tensor]:
        weights, moments = self._engine.weights(), [state["exp_avg"] for state in self._engine.moments()]
        lr, decay, momentum = zip(*(self._groups[factor] for factor in range(len(self._groups))), strict=True)
        if self._guard is not None:
            self._guard.keep([weights, moments])
        _average_(moments, gradients, momentum)
        streams = self._retiler.to_blocks([weights, moments], [self._everything] * 2)
        of_factors, of_moments = self._blocks.grams(streams[0]), self._moment_blocks.grams(streams[1])
        both = {r: torch.cat([of_factors[r], of_moments[r]], dim=1) for r in of_factors}
        halves = {r: grams.chunk(2, dim=1) for r, grams in reduce_grams(both, self._comm).items()}
        self.grams, moment_grams = ({r: half[which] for r, half in halves.items()} for which in (0, 1))
        update = muon_update(
            self.grams, moment_grams, self._per_factor(lr), self._per_factor(decay), self._inverse_scaling
        )
        self._blocks.combine_(streams, [0], update.matrices)
        self._retiler.from_blocks(streams[:1], [weights], [self._everything])
        return self._guarded(update.deficient, self.grams, moment_grams)


def _average_(moments: Sequence[Tensor], gradients: Sequence[Tensor | None], momentum: Sequence[float]) -> None:
    """Update moving averages in place: ``m <- momentum m + (1 - momentum) grad``, elementwise, so on any piece."""
    alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor | None]]] = {}
    for moment, gradient, beta in zip(moments, gradients, momentum, strict=True):
        if moment.numel():
            alike.setdefault((beta, moment.device, moment.dtype, gradient is None), []).append((moment, gradient))
    for (beta, device, dtype, _), members in alike.items():
        averages = [moment for moment, _ in members]
        arriving = [g.view_as(m).to(device, dtype, non_blocking=True) for m, g in members if g is not None]
        if arriving:
            torch._foreach_lerp_(averages, arriving, 1 - beta)
        else:
            torch._foreach_mul_(averages, beta)
