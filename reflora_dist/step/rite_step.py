"""The LoRA-RITE update of the factors, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives.communicator import Communicator
from ..collectives.grams import from_triangles, reduce_grams_and, triangles
from ..collectives.retile import Retiler
from ..collectives.tiling import head
from ..engines.base import Engine
from ..methods.lora_rite import Groups, Moments, bias_corrected, packed_size, rite_update
from .optimizer_step import OptimizerStep
from .rite_optimizer import LoRARite

_FACTORS, _MOMENTS = 0, 2  # the streams that a step changes


class RiteStep(OptimizerStep):
    """The step of a LoRARite optimizer.

    Communication per step: one all-reduce of the Gram matrices of ``[X, grad, moment]`` and of the second moments (each
    rank holds a part of them); two exchanges if factors move; for float16 factors one all-reduce of a flag per pair.
    None if every rank holds the factors whole.
    """

    _optimizer: LoRARite

    def __init__(self, optimizer: LoRARite, engine: Engine, retiler: Retiler, communicator: Communicator) -> None:
        super().__init__(optimizer, engine, retiler, communicator)
        self._packed = _Packed(engine, self._blocks.pairs_by_rank, communicator)
        self._rows = self._per_factor(
            [float(size) for pair in engine.pairs for size in (pair.in_features, pair.out_features)]
        )

    def _heads(self) -> dict[int, list[slice]]:
        return self._packed.heads()

    def _update(self, gradients: list[Tensor | None]) -> dict[int, Tensor]:
        states = self._engine.moments()
        weights, moments = self._engine.weights(), [state["exp_avg"] for state in states]
        channels: list[Sequence[Tensor | None]] = [weights, gradients, moments]
        streams = self._retiler.to_blocks(channels, [self._everything] * 3)
        seconds = [state["exp_avg_sq"] for state in states]
        local_grams = self._blocks.stacked_grams(streams)
        shared = [self._packed.read(seconds), self._own_steps()]
        grams, (packed, steps) = reduce_grams_and(local_grams, shared, self._comm)
        self.grams = {r: both[..., :r, :r].clone() for r, both in grams.items()}  # a view would keep all of it
        groups = self._read_settings(steps)
        update = rite_update(grams, self._packed.unpack(packed), groups, self._optimizer.settings)
        if self._guard is not None:
            self._guard.keep([weights, moments, seconds])
        self._blocks.combine_(streams, [_FACTORS, _MOMENTS], update.matrices)
        changed = [streams[_FACTORS], streams[_MOMENTS]]
        self._retiler.from_blocks(changed, [weights, moments], [self._everything] * 2)
        self._packed.write(self._packed.pack(update.moments), seconds)
        return self._guarded(update.skipped, grams)

    def _settings(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        step = float(state["step"]) - 1  # the optimizer has counted this step
        return step, float(group["lr"]), float(group["weight_decay"]), *group["betas"]

    def _own_steps(self) -> Tensor:
        """Steps done, ``[2 P]`` float64, for the factors whose first element this rank holds; zero for the others.

        A rank that holds nothing of a factor cannot answer: its engine may not have loaded the factor's step count.
        """
        first = self._packed.first
        steps = [self._groups[factor][0] if factor in first else 0.0 for factor in range(len(self._groups))]
        return torch.tensor(steps, dtype=torch.float64).to(self._comm.device, non_blocking=True)

    def _read_settings(self, steps: Tensor) -> Groups:
        values = zip(*(self._groups[factor][1:] for factor in range(len(self._groups))), strict=True)
        lr, weight_decay, beta1, beta2 = map(self._per_factor, values)
        both = steps.view(-1, 2).T
        for r, pairs in self._pairs.items():
            done = both.index_select(1, pairs)
            beta1[r], beta2[r] = bias_corrected(beta1[r], done), bias_corrected(beta2[r], done)
        return Groups(self._rows, lr, weight_decay, beta1, beta2)


class _Packed:
    """Second moments and escaped mass, stored in the first elements of every factor's ``exp_avg_sq``.

    One vector holds the numbers of all factors, one factor after the other. Each rank fills in the elements that it
    holds; the sum over ranks is the whole vector.
    """

    def __init__(
        self,
        engine: Engine,
        pairs_by_rank: dict[int, list[int]],
        communicator: Communicator,
    ) -> None:
        self._device = device = communicator.device
        self._runs: list[tuple[int, int, int, int]] = []  # factor, start in shard, start in vector, count
        self._starts: list[int] = []
        size = 0
        for factor, layout in enumerate(engine.layouts()):
            count = layout.experts * packed_size(layout.lora_rank)
            self._starts.append(size)
            for start, position, numel in head(layout, communicator.rank, count):
                self._runs.append((factor, start, size + position, numel))
            size += count
        self._size = size
        self.first = {factor for factor, _, position, _ in self._runs if position == self._starts[factor]}
        held = [torch.arange(position, position + numel) for _, _, position, numel in self._runs]
        self._held = torch.cat([torch.empty(0, dtype=torch.int64), *held]).to(device)
        self._places = {r: self._index(r, pairs).to(device) for r, pairs in pairs_by_rank.items()}

    def _index(self, lora_rank: int, pairs: Sequence[int]) -> Tensor:
        """Positions of each pair's numbers in the vector, ``[2, P_r, r (r + 1) / 2 + 1]`` int64."""
        size = packed_size(lora_rank)
        first = {pair: place for place, pair in reversed(list(enumerate(pairs)))}
        experts = torch.tensor([place - first[pair] for place, pair in enumerate(pairs)])
        starts = torch.tensor([[self._starts[2 * pair + side] for pair in pairs] for side in (0, 1)])
        return starts[..., None] + size * experts[:, None] + torch.arange(size)

    def heads(self) -> dict[int, list[slice]]:
        """Return, by factor, the slices of this rank's shard that hold the numbers; factors without any are absent."""
        heads: dict[int, list[slice]] = {}
        for factor, start, _, numel in self._runs:
            heads.setdefault(factor, []).append(slice(start, start + numel))
        return heads

    def read(self, seconds: Sequence[Tensor]) -> Tensor:
        """Return the float64 vector with this rank's part, and zeros elsewhere."""
        vector = torch.zeros(self._size, dtype=torch.float64, device=self._device)
        if self._runs:
            parts = [seconds[factor].view(-1)[start : start + numel] for factor, start, _, numel in self._runs]
            if len({part.device for part in parts}) > 1:  # a model spread over several devices
                parts = [part.to(self._device) for part in parts]
            vector[self._held] = torch.cat(parts).to(self._device, torch.float64, non_blocking=True)
        return vector

    def write(self, vector: Tensor, seconds: Sequence[Tensor]) -> None:
        """Write this rank's part of the vector into its shards."""
        if not self._runs:
            return
        targets = [seconds[factor].view(-1)[start : start + numel] for factor, start, _, numel in self._runs]
        values = vector[self._held].to(targets[0].device, targets[0].dtype)
        torch._foreach_copy_(targets, list(values.split([numel for *_, numel in self._runs])))

    def unpack(self, vector: Tensor) -> Moments:
        moments = Moments({}, {})
        for r, places in self._places.items():
            values = vector[places]
            moments.second[r], moments.escape[r] = from_triangles(values[..., :-1], r), values[..., -1]
        return moments

    def pack(self, moments: Moments) -> Tensor:
        vector = torch.empty(self._size, dtype=torch.float64, device=self._device)
        for r, places in self._places.items():
            vector[places] = torch.cat([triangles(moments.second[r]), moments.escape[r][..., None]], dim=-1)
        return vector
