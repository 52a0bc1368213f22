"""The LoRA-RITE update of the factors, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra.tall_blocks import BlockSet
from ..algebra.types import Matrices
from ..collectives.communicator import Communicator
from ..collectives.grams import from_triangles, reduce_grams_and, triangles
from ..collectives.ranks import raise_on_all_ranks
from ..collectives.retile import Retiler
from ..collectives.tiling import head
from ..engines.base import Engine, Firing
from ..methods.lora_rite import Groups, Moments, bias_corrected, packed_size, rite_update
from .base import Step
from .figures import gram_figures
from .half import HalfGuard
from .rite_optimizer import LoRARite

_FACTORS, _MOMENTS = 0, 2  # the streams that a step changes


class RiteStep(Step):
    """The step of a LoRARite optimizer: it updates the factors and their moments.

    A pair whose new factors would leave the range of float16 keeps its factors and its moments.

    Communication per step: one all-reduce of the Gram matrices of ``[X, grad, moment]`` and of the second moments (each
    rank holds a part of them); two exchanges if factors move; for float16 factors one all-reduce of a flag per pair.
    None if every rank holds the factors whole.

    Args:
        optimizer: the optimizer with its hyperparameters and state.
        engine: the engine of that optimizer.
        retiler, communicator: made for the engine's group.

    Attributes:
        grams: ``{r: [2, P_r, r, r]}`` float64, Gram matrices of the factors before the last step; empty before the
            first.
    """

    def __init__(
        self,
        optimizer: LoRARite,
        engine: Engine,
        retiler: Retiler,
        communicator: Communicator,
    ) -> None:
        super().__init__(engine, communicator)
        self._optimizer = optimizer
        self._retiler = retiler
        self._blocks = BlockSet(retiler.specs, [pair.lora_rank for pair in engine.pairs], communicator.device)
        self._everything = (True,) * (2 * len(engine.pairs))
        self._packed = _Packed(engine, self._blocks.pairs_by_rank, communicator)
        self._rows = self._per_factor(
            [float(size) for pair in engine.pairs for size in (pair.in_features, pair.out_features)]
        )
        device = communicator.device  # indexing with a list would make every step wait for the device
        self._pairs = {r: torch.tensor(pairs, device=device) for r, pairs in self._blocks.pairs_by_rank.items()}
        self._free_runs: dict[int, list[tuple[int, int]]] = {}
        self._held: dict[int, Tensor | None] = {}  # gradients of earlier firings of this step
        self._groups: dict[int, tuple[float, ...]] = {}  # settings of the factors in this step's firings so far
        self._skipped = torch.zeros((), dtype=torch.int64, device=communicator.device)
        self._guard = HalfGuard(communicator) if engine.has_half_gradients() else None
        self.grams: Matrices = {}

    @classmethod
    def connected(cls, engine: Engine, retiler: Retiler, communicator: Communicator) -> RiteStep:
        """Make a step and register it with the engine's optimizer.

        Raises:
            ValueError: on every rank; the optimizer's state is that of another optimizer.

        Communication: one all-gather of small objects; every rank must call.
        """
        assert isinstance(engine.optimizer, LoRARite)
        step = cls(engine.optimizer, engine, retiler, communicator)
        with raise_on_all_ranks("reading the optimizer's state"):
            step.refuse_foreign_state()
        engine.optimizer.connect(step)
        return step

    def before_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        self.stopwatch.start(new_step=firing.first)  # the method's work is the update itself
        return None

    def after_update(self, firing: Firing, *, due: bool) -> Tensor | None:
        self.stopwatch.stop()
        return self._take_skipped() if firing.last else None

    def figures(self) -> dict[str, float]:
        return gram_figures(self.grams) if self.grams else {}

    def close(self) -> None:
        self._optimizer.connect(None)

    def refuse_foreign_state(self) -> None:
        """Refuse moments of another optimizer. Local, no communication.

        Raises:
            ValueError: a second moment is not zero beyond the elements that LoRA-RITE uses, so an elementwise optimizer
                wrote it.
        """
        heads = self._packed.heads()
        for factor, state in enumerate(self._engine.moments()):
            second = state.get("exp_avg_sq")
            if second is None:
                continue
            own = sum(int(second.view(-1)[part].count_nonzero()) for part in heads.get(factor, []))
            if int(second.count_nonzero()) > own:
                raise ValueError(
                    "the optimizer's state is that of another optimizer (AdamW keeps moments of the same names): start "
                    "LoRARite without it, or continue with the optimizer that wrote it"
                )

    def others(self, parameter: Tensor) -> list[tuple[int, int]]:
        """See :class:`reflora_dist.step.rite_optimizer.FactorUpdate`."""
        if not self._free_runs:
            self._free_runs = _free_runs(self._engine)
        numel = _local_numel(parameter)
        return self._free_runs.get(id(parameter), [(0, numel)] if numel else [])

    def holds_no_factor(self, parameter: Tensor) -> bool:
        """See :class:`reflora_dist.step.rite_optimizer.FactorUpdate`."""
        self.others(parameter)  # its first call looks up the parameters that hold factors
        return id(parameter) not in self._free_runs

    def __call__(self) -> None:
        """Keep this firing's gradients; in the last firing of the step update every factor."""
        firing = self._engine.firing()
        if firing.first:
            self._held, self._groups = {}, {}
        gradients = self._engine.gradients()
        self._read_groups(firing.present)
        if not firing.last:  # the engine frees these gradients before the last firing
            for factor, present in enumerate(firing.present):
                if present:
                    gradient = gradients[factor]
                    self._held[factor] = None if gradient is None else gradient.clone()
            return
        for factor, gradient in self._held.items():
            gradients[factor] = gradient
        self._held = {}
        self._update(gradients)
        if not firing.first:
            self._engine.publish_weights(in_step=True)

    def _take_skipped(self) -> Tensor:
        """Return how many pairs had too large a gradient or update since the last call; 0-dim int64."""
        skipped, self._skipped = self._skipped, torch.zeros_like(self._skipped)
        return skipped

    def _update(self, gradients: list[Tensor | None]) -> None:
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
        skipped = update.skipped
        if self._guard is not None:
            left = self._guard.restore(never=self._broken(grams))
            skipped = {r: flags | left.index_select(0, self._pairs[r]) for r, flags in skipped.items()}
        self._skipped += torch.stack([flags.sum() for flags in skipped.values()]).sum()

    def _broken(self, grams: Matrices) -> Tensor:
        """``[P]`` bool: pairs that were not finite before the step. They stay so, as with AdamW."""
        broken = torch.empty(len(self._engine.pairs), dtype=torch.bool, device=self._comm.device)
        for r, both in grams.items():
            broken.index_copy_(0, self._pairs[r], ~torch.isfinite(both).flatten(2).all(dim=2).all(dim=0))
        return broken

    def _read_groups(self, present: Sequence[bool]) -> None:
        group_of = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for factor, (parameter, _) in enumerate(self._engine.holders()):
            if present[factor]:
                group = group_of[id(parameter)]
                step = float(self._optimizer.state[parameter]["step"]) - 1  # the optimizer has counted this step
                self._groups[factor] = step, float(group["lr"]), float(group["weight_decay"]), *group["betas"]

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

    def _per_factor(self, values: Sequence[float]) -> Matrices:
        """``{r: [2, P_r]}`` from one value per factor."""
        both = torch.tensor(values, dtype=torch.float64).view(-1, 2).T
        return {
            r: both[:, pairs].to(self._comm.device, non_blocking=True)
            for r, pairs in self._blocks.pairs_by_rank.items()
        }


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
            count = packed_size(layout.lora_rank)
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
        starts = torch.tensor([[self._starts[2 * pair + side] for pair in pairs] for side in (0, 1)])
        return starts[..., None] + torch.arange(packed_size(lora_rank))

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


def _free_runs(engine: Engine) -> dict[int, list[tuple[int, int]]]:
    """Return the stretches ``(start, stop)`` without a factor, for each parameter that holds one, by its id."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    sizes: dict[int, int] = {}
    for (parameter, start), weight in zip(engine.holders(), engine.weights(), strict=True):
        pieces.setdefault(id(parameter), []).append((start, start + weight.numel()))
        sizes[id(parameter)] = _local_numel(parameter)
    free_runs = {}
    for key, taken in pieces.items():
        position, free = 0, []
        for start, stop in sorted(taken):
            if start > position:
                free.append((position, start))
            position = max(position, stop)
        if sizes[key] > position:
            free.append((position, sizes[key]))
        free_runs[key] = free
    return free_runs


def _local_numel(parameter: Tensor) -> int:
    to_local = getattr(parameter, "to_local", None)
    return (to_local() if to_local is not None else parameter).numel()
