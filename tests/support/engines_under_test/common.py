"""What every engine under test has in common: one training loop over a wrapped model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.workloads import Attach, Factors, Settings, as_peft_names_them, named_factors

Trained = tuple[list[float], Factors]

# "cuda" in tests/support/parity_program.py where there is a GPU; the current one of each rank
DEVICE = torch.device(os.environ.get("REFLORA_TEST_DEVICE", "cpu"))


class Wrapped:
    """A model and optimizer as an engine returned them, and how that engine takes a step.

    Subclasses override what their engine does differently. ``bare`` is the PEFT model inside, which some
    callers hold instead of the wrapped one.
    """

    def __init__(self, model: Any, optimizer: Any, settings: Settings, bare: nn.Module | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.bare = bare if bare is not None else model

    def accumulation_context(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; may put off the reduction until the last one."""
        return contextlib.nullcontext()

    def local(self, batch: Tensor) -> Tensor:
        """This rank's part of a global batch ``[rows, seq]``."""
        return batch.chunk(world_size())[rank()]

    def loss(self, rows: Tensor) -> Tensor:
        """The mean loss of a micro-batch."""
        return self.model(input_ids=rows, labels=rows).loss

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch."""
        (loss / self.settings.grad_accum).backward()

    def clip(self) -> None:
        """Clip the accumulated, reduced gradient."""
        torch.nn.utils.clip_grad_norm_(trainable(self.model), self.settings.clip)

    def step(self) -> None:
        """Finish a global batch: clip, update, clear the gradients."""
        if self.settings.clip:
            self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def factors(self) -> Factors:
        """Every factor, whole and exact, on every rank."""
        return copied(named_factors(self.model))


@dataclasses.dataclass(frozen=True)
class Engine:
    """One way to train: ``wrap(model, settings, micro_batch_size)``, and the world sizes it is valid on.

    The tolerances are None where the reference's own hold; bf16 and fp16 weights cannot follow it to those.
    """

    name: str
    wrap: Callable[[nn.Module, Settings, int], Wrapped]
    world_sizes: tuple[int, ...] = (2, 3, 4)
    takes_callback = False
    model_dtype: torch.dtype = torch.float32
    bf16_factor_tolerance: float | None = None
    bf16_loss_tolerance: float | None = None

    def train(
        self,
        model: nn.Module,
        batches: Tensor,
        settings: Settings,
        attach: Attach | None = None,
        *,
        hand_over_bare: bool = False,
    ) -> Trained:
        """Train on this rank's part of every global batch; every rank gets the same losses and factors back.

        Args:
            model: a PEFT model, not wrapped yet, equal on all ranks.
            batches: ``[steps, global_batch, seq]``.
            settings: AdamW, clipping and accumulation.
            attach: called with model and optimizer as the engine returned them, before the first step.
            hand_over_bare: give ``attach`` the PEFT model inside instead of the wrapped one.
        """
        micro_batch_size = batches.shape[1] // (world_size() * settings.grad_accum)
        assert micro_batch_size * world_size() * settings.grad_accum == batches.shape[1], "the split must be even"
        wrapped = self.wrap(model.to(DEVICE), settings, micro_batch_size)
        if attach is not None:
            attach(wrapped.bare if hand_over_bare else wrapped.model, wrapped.optimizer)
        losses = [train_on(wrapped, batch) for batch in batches.to(DEVICE)]
        return mean_over_ranks(losses), on_the_host(wrapped.factors())


def train_on(wrapped: Wrapped, batch: Tensor) -> float:
    """One optimizer step on this rank's part of a global batch. Returns its mean loss."""
    micro_batches = wrapped.local(batch).chunk(wrapped.settings.grad_accum)
    total = 0.0
    for index, micro_batch in enumerate(micro_batches):
        with wrapped.accumulation_context(is_last=index == len(micro_batches) - 1):
            loss = wrapped.loss(micro_batch)
            wrapped.backward(loss)
        total += loss.item()
    wrapped.step()
    return total / len(micro_batches)


def cut_sequences(rows: Tensor, parts: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, positions and next tokens of rows ``[rows, seq]``, as the ranks of a sequence share them."""
    positions = torch.arange(rows.shape[1], device=rows.device).repeat(rows.shape[0], 1)
    wanted = nn.functional.pad(rows[:, 1:], (0, 1), value=-100)  # the next token, also across the cut
    cut = [[part.contiguous() for part in whole.chunk(parts, dim=1)] for whole in (rows, positions, wanted)]
    return list(zip(*cut, strict=True))


def summed_loss(model: Any, tokens: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """The loss summed over the tokens of one part."""
    logits = model(input_ids=tokens, position_ids=positions).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(losses: list[float]) -> list[float]:
    """The mean of all ranks' losses, step by step; the slices are of equal size, so it is the global mean."""
    total = torch.tensor(losses, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total / world_size()).tolist()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return settings.optimizer(trainable(model))


def on_the_host(factors: Factors) -> Factors:
    """To be compared with a reference."""
    return {name: factor.cpu() for name, factor in factors.items()}


def copied(factors: dict[str, nn.Parameter]) -> Factors:
    """By PEFT's names, and in its shapes."""
    return as_peft_names_them({name: factor.detach().clone() for name, factor in factors.items()})
