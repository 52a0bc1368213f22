"""The interface of an engine: the piece of each factor that this rank holds, and its place in memory."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives.tiling import Layout
from .pairs import AdapterPair


class Firing(NamedTuple):
    """One call of the innermost optimizer's ``step``. Some engines make several calls per training step.

    Attributes:
        present: for each factor, whether this call updates it; the same on all ranks.
        first, last: whether this is the first and the last call of the training step.
    """

    present: tuple[bool, ...]
    first: bool
    last: bool


class Engine(abc.ABC):
    """A training engine as this rank sees it. Factors are listed lora_A, lora_B, lora_A, ... in the pairs' order.

    Args:
        pairs: the model's adapters.
        optimizer: the innermost torch optimizer.

    Attributes:
        name: the engine's name in reports and messages.
        layout: "whole", "tall" (rows of the tall factors) or "flat" (flat pieces, some of lora_A stored ``[r, in]``).
        optimizer: the innermost torch optimizer, whose hooks run directly before and after the update.
        group: the ranks that together hold one copy of every factor; None if each rank holds the factors whole.
        replicas: the ranks that hold the same piece of every factor; None if there are none or they are unknown.
        pairs: the model's adapters.
        state_format: "dcp" for state dictionaries that torch.distributed.checkpoint saves, "deepspeed" for DeepSpeed's
            own files.
        state_name: name of the checkpoint format, by default ``name``. Engines with the same ``state_name`` read each
            other's checkpoints.
        resumes_on_other_ranks: whether a checkpoint loads unchanged on another number of ranks.
        has_peft_form: whether checkpoints hold lora_A and its moments as ``[r, in]``, also if the model stores lora_A
            tall. Engines that save by parameters' names and shapes cannot do so.
        state_dict_lacks_parameters: whether torch loses parameters in the model's own ``state_dict()``.
        reduces_gradients_to_half: whether gradients are float16 for weights of any dtype.
    """

    name: str
    layout: str
    optimizer: torch.optim.Optimizer
    group: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    state_format: Literal["dcp", "deepspeed"] = "dcp"
    resumes_on_other_ranks = False
    has_peft_form = False
    state_dict_lacks_parameters = False
    reduces_gradients_to_half = False

    def __init__(self, pairs: Sequence[AdapterPair], optimizer: torch.optim.Optimizer) -> None:
        self.pairs = tuple(pairs)
        self.optimizer = optimizer
        self._owners = [owner for pair in self.pairs for owner in pair.owners()]

    @abc.abstractmethod
    def layouts(self) -> list[Layout]:
        """Return the storage and the cut of every factor, the same on all ranks of the group."""

    @abc.abstractmethod
    def weights(self) -> list[Tensor]:
        """Return this rank's piece of every factor, as the optimizer updates it: the fp32 master if there is one."""

    @abc.abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """Return this rank's piece of every factor's gradient, ready for the optimizer; None for a missing gradient."""

    def has_half_gradients(self) -> bool:
        """Return whether any gradient is float16. All ranks answer alike, also those that hold no gradient."""
        return self.reduces_gradients_to_half or any(weight.dtype == torch.float16 for weight in self.weights())

    @abc.abstractmethod
    def moments(self) -> list[dict[str, Tensor]]:
        """Return, for each factor, the optimizer's state tensors of this rank's piece; empty before the first step."""

    @abc.abstractmethod
    def holders(self) -> list[tuple[Tensor, int]]:
        """Return, for each factor, the optimizer's parameter that holds this rank's piece, and the offset in it."""

    def firing(self) -> Firing:
        """Return the current firing. Called while ``optimizer.step`` runs."""
        return Firing((True,) * (2 * len(self.pairs)), first=True, last=True)

    def end_firing(self) -> None:
        """End the current firing. Called once per firing, after the update."""

    def publish_weights(self, in_step: bool) -> None:
        """Copy changed masters to the weights that the model computes with, if these are separate tensors.

        Args:
            in_step: whether the call comes from within the training step, which publishes some weights itself.

        Communication: the engine's own; every rank must call.
        """

    @property
    def state_name(self) -> str:
        return self.name

    def require_wrapped(self, model: nn.Module) -> None:
        """Make sure that the model is the wrapped one, which the engine needs to save and load.

        Raises:
            ValueError: the model is the bare one inside the wrapper.
        """

    def write_masters(self, values: Mapping[Tensor, Tensor]) -> None:
        """Write whole values into this rank's part of the masters, if these are separate from the weights.

        Args:
            values: whole values by the model's parameter. Parameters that are not trained are skipped.
        """

    def check(self) -> None:
        """Make sure that the factors have not moved since attach().

        Raises:
            RuntimeError: the model was sharded or moved, or the optimizer rebuilt, after attach().
        """

    def _check_pieces(self) -> None:
        """Make sure that this rank's pieces have the sizes that the layouts give.

        Raises:
            ValueError: a piece has another size.
        """
        rank = dist.get_rank(self.group) if self.group is not None else 0
        for name, weight, layout in zip(self._factor_names(), self.weights(), self.layouts(), strict=True):
            piece = layout.piece(rank)
            if weight.numel() != piece.numel:
                raise ValueError(
                    f"{name} has {weight.numel()} elements on this rank, {self.name} should give it {piece.numel} of "
                    f"{layout.numel} ({layout}): pass the model and the optimizer as the engine returned them"
                )

    def _factors(self) -> list[Tensor]:
        # Factors are looked up in every step, since accelerate and FSDP2 replace parameters. The lookup goes to
        # _parameters first: nn.Module's __getattr__ takes longer than the step's algebra on a GPU.
        return [
            factor if (factor := module._parameters.get(name)) is not None else getattr(module, name)
            for module, name in self._owners
        ]

    def _factor_names(self) -> list[str]:
        return [f"{pair.name}.{side}" for pair in self.pairs for side in ("lora_A", "lora_B")]
