"""From factors and gradients to refactored gradients: every rank solves for all pairs, or each pair's owner does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import BlockSet, Matrices
from .communication import Communicator
from .exchange import Channel
from .grams import from_triangles, reduce_grams, triangles
from .methods import GradientMethod
from .methods.base import Transform
from .retile import Retiler

_GRANULE = 64  # bytes: a message is a multiple of it, so that pieces of factors beside it move in large grains


class Solution(NamedTuple):
    """What is done to gradients in a step.

    Attributes:
        whole: for all pairs; without ``left`` where all lora_A are with their owners.
        owned: for the pairs that this rank owns, in the order of ``Retiler.owned``; None where pairs have no owners.
        grams: ``{r: [2, P_r, r, r]}`` float64, of the whole factors.
    """

    whole: Transform
    owned: Transform | None
    grams: Matrices


class Everywhere:
    """Nothing of a factor moves: Grams are summed over ranks, and every rank solves for all pairs.

    Communication: one all-reduce to solve, none to apply.
    """

    def __init__(
        self, method: GradientMethod, retiler: Retiler, lora_ranks: Sequence[int], device: torch.device
    ) -> None:
        self._method = method
        self._retiler = retiler
        self._blocks = BlockSet(retiler.specs, lora_ranks, device)
        self._everything = (True,) * (2 * len(lora_ranks))

    def solve(self, weights: Channel, communicator: Communicator) -> Solution:
        """From the local parts of all factors."""
        grams = self._blocks.grams(self._retiler.direct(weights, self._everything))
        grams = reduce_grams(grams, communicator)
        return Solution(self._method.solve(grams), None, grams)

    def apply(self, solution: Solution, gradients: Channel, present: Sequence[bool]) -> None:
        """Change the gradients that are present."""
        self._blocks.multiply_(self._retiler.direct(gradients, present), solution.whole.matrices)

    def solve_and_apply(
        self, weights: Channel, gradients: Channel, present: Sequence[bool], communicator: Communicator
    ) -> Solution:
        """Both."""
        solution = self.solve(weights, communicator)
        self.apply(solution, gradients, present)
        return solution


class AtOwners:
    """lora_A, and what of lora_B is cut, goes to each pair's owner, who solves for the pair.

    With it goes a message from every rank, about every pair: the Grams of the rows that stay there. On its way back it
    is the owner's answer: whether there is a solution, the Grams of the whole factors, ``right``, and ``left`` if any
    lora_A stays where it is.

    So pairs are solved for once, and a rank computes on whole lora_A, of as many elements as on any other rank where
    there are more pairs than ranks; beyond, ranks without a pair wait for owners, each of which answers all ranks.

    Communication: two all-to-alls to solve, two to apply, and no more to do both at a time.
    """

    def __init__(
        self,
        method: GradientMethod,
        retiler: Retiler,
        lora_ranks: Sequence[int],
        communicator: Communicator,
    ) -> None:
        self._method = method
        self._retiler = retiler
        device = communicator.device
        self._device = device
        self._direct = BlockSet(retiler.direct_specs, lora_ranks, device)
        places = {pair: place for place, pair in enumerate(retiler.owned)}
        received = [spec._replace(pair=places[spec.pair]) for spec in retiler.received_specs]
        self._received = BlockSet(received, [lora_ranks[pair] for pair in retiler.owned], device)
        self._num_direct, self._num_blocks = len(retiler.direct_specs), len(retiler.specs)
        self._everything = (True,) * (2 * len(lora_ranks))
        self._owned_counts = {
            about.lora_rank: len(about.pairs) for about in retiler.messages if about.owner == communicator.rank
        }
        # {r: [P_r, values]}, the pairs of one owner one behind the other
        self._values: Matrices = {}
        self._places: dict[int, tuple[Tensor, Tensor]] = {}  # of those among all pairs of r, and the other way round
        self._messages: list[Tensor] = []
        for r, pairs in sorted(self._direct.pairs_by_rank.items()):  # the order of messages
            by_owner = [about.pairs for about in retiler.messages if about.lora_rank == r]
            order = torch.tensor([pairs.index(pair) for of_owner in by_owner for pair in of_owner])
            self._places[r] = order.to(device), order.argsort().to(device)
            values = message_values(r, retiler.keeps_a)
            self._values[r] = torch.zeros(len(pairs), values, dtype=torch.float64, device=communicator.shard_device)
            self._messages += self._values[r].view(retiler.dtype).split([len(of_owner) for of_owner in by_owner])

    def solve(self, weights: Channel, communicator: Communicator) -> Solution:
        """From the local parts of all factors."""
        return self._solve(weights, [], [], communicator)

    def apply(self, solution: Solution, gradients: Channel, present: Sequence[bool]) -> None:
        """Change the gradients that are present."""
        assert solution.owned is not None
        (blocks,) = self._retiler.to_blocks([gradients], [present])
        self._received.multiply_(blocks[self._num_direct :], solution.owned.matrices)
        self._retiler.from_blocks([blocks], [gradients], [present])
        self._direct.multiply_(blocks[: self._num_direct], solution.whole.matrices)

    def solve_and_apply(
        self, weights: Channel, gradients: Channel, present: Sequence[bool], communicator: Communicator
    ) -> Solution:
        """Both."""
        return self._solve(weights, [gradients], [present], communicator)

    def _solve(
        self, weights: Channel, gradients: list[Channel], present: list[Sequence[bool]], communicator: Communicator
    ) -> Solution:
        """Solve, and apply the solution to one channel of gradients or none."""
        self._write_partial_grams(weights)
        channels: list[Channel] = [[*weights, *self._messages], *gradients]
        messages = (True,) * len(self._messages)
        streams = self._retiler.to_blocks(channels, [self._everything + messages, *present], communicator)
        owned = self._answer(streams[0])
        for blocks in streams[1:]:
            self._received.multiply_(blocks[self._num_direct : self._num_blocks], owned.matrices)
        streams[0][: self._num_blocks] = [None] * self._num_blocks  # weights stay as they are
        nothing = (False,) * len(self._everything)
        self._retiler.from_blocks(streams, channels, [nothing + messages, *present], communicator)
        whole, grams = self._read_answers()
        for blocks in streams[1:]:
            self._direct.multiply_(blocks[: self._num_direct], whole.matrices)
        return Solution(whole, owned, grams)

    def _write_partial_grams(self, weights: Channel) -> None:
        partial = self._direct.grams(self._retiler.direct(weights, self._everything))
        for r, grams in partial.items():
            order, _ = self._places[r]
            halves = triangles(grams).transpose(0, 1).flatten(1).index_select(0, order)
            self._values[r][:, 1 : 1 + halves.shape[1]].copy_(halves)

    def _answer(self, blocks: Sequence[Tensor | None]) -> Transform:
        """Solve for the owned pairs, and write what comes of it into the messages about them."""
        received = self._received.grams(blocks[self._num_direct : self._num_blocks])
        messages = {}
        for (r, count), message in zip(self._owned_counts.items(), blocks[self._num_blocks :], strict=True):
            assert message is not None
            messages[r] = message.view(torch.float64).view(-1, count, self._values[r].shape[1])  # of every rank
        grams = {}
        for r, of_ranks in messages.items():
            size = r * (r + 1)
            halves = of_ranks[:, :, 1 : 1 + size].sum(dim=0).unflatten(1, (2, -1)).transpose(0, 1)
            grams[r] = received[r] + from_triangles(halves, r)
        transform = self._method.solve(grams)
        for r, of_ranks in messages.items():
            of_a, of_b = transform.matrices[r]
            matrices = [*grams[r], of_b, *([of_a] if self._retiler.keeps_a else [])]
            halves = triangles(torch.stack(matrices)).transpose(0, 1).flatten(1)
            answer = torch.cat([transform.solved[r].to(halves.dtype)[:, None], halves], dim=1)
            of_ranks[:, :, : answer.shape[1]] = answer
        return transform

    def _read_answers(self) -> tuple[Transform, Matrices]:
        whole, grams = Transform({}, {}), {}
        for r, values in self._values.items():
            count, size = 4 if self._retiler.keeps_a else 3, r * (r + 1) // 2
            _, place = self._places[r]
            answers = values.to(self._device).index_select(0, place)
            halves = answers[:, 1 : 1 + count * size].unflatten(1, (count, size)).transpose(0, 1)
            matrices = from_triangles(halves, r)
            grams[r] = matrices[:2].clone()  # a view would keep all of them until then
            whole.matrices[r] = torch.stack([matrices[-1], matrices[2]])
            whole.solved[r] = answers[:, 0] > 0
        return whole, grams


def message_values(lora_rank: int, with_left: bool) -> int:
    """Float64 values of a message about a pair: a flag, three or four triangles, and what fills it up."""
    values = 1 + (4 if with_left else 3) * lora_rank * (lora_rank + 1) // 2
    granule = _GRANULE // 8
    return -(-values // granule) * granule
