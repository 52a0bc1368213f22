"""What an engine has to answer: which part of each factor does this rank hold, and where does it lie."""

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
    """One call of the innermost optimizer's ``step``; some engines make several per training step.

    Attributes:
        present: per factor whether it is updated by this call (the same on all ranks).
        first, last: whether this is the first, the last call of the training step.
    """

    present: tuple[bool, ...]
    first: bool
    last: bool


class Engine(abc.ABC):
    """The local view of a training engine. Factors are listed lora_A, lora_B, lora_A, ... in the pairs' order.

    Attributes:
        name: for reports.
        layout: "whole", "tall" (rows of the tall factors) or "flat" (flat pieces, some of lora_A stored ``[r, in]``).
        optimizer: the innermost torch optimizer, whose hooks run right around the update.
        group: the ranks that together hold one copy of every factor; None if each rank holds them whole.
        replicas: the ranks that hold the same part of every factor; None if there are none, or unknown.
        pairs: the adapters.
        state_format: "dcp", state dictionaries that torch.distributed.checkpoint saves, or "deepspeed", its own files.
        state_name: engines of one state_name read each other's checkpoints; ``name`` unless said otherwise.
        resumes_on_other_ranks: whether a checkpoint loads on another number of ranks as it is.
        has_peft_form: whether checkpoints have lora_A as ``[r, in]``, its moments too, however the model stores it.
            Engines that save by parameters' names and shapes cannot.
        state_dict_lacks_parameters: whether torch loses parameters in the model's own ``state_dict()``.
        reduces_gradients_to_half: gradients are float16, whatever the weights are.
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
        """How every factor is stored and cut: the same on all ranks of the group, and true of this one's pieces."""

    @abc.abstractmethod
    def weights(self) -> list[Tensor]:
        """The local part of every factor, as the optimizer updates it (the fp32 masters where there are any)."""

    @abc.abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """The local part of every factor's gradient, ready for the optimizer; None where there is none."""

    def has_half_gradients(self) -> bool:
        """Whether some are float16. All ranks answer alike, also one that has no gradient since it holds nothing."""
        return self.reduces_gradients_to_half or any(weight.dtype == torch.float16 for weight in self.weights())

    @abc.abstractmethod
    def moments(self) -> list[dict[str, Tensor]]:
        """Per factor the optimizer's state tensors of the local part, empty before the first step."""

    @abc.abstractmethod
    def holders(self) -> list[tuple[Tensor, int]]:
        """Per factor the optimizer's parameter that contains its local part, and that part's first element there."""

    def firing(self) -> Firing:
        """Which factors the call of ``optimizer.step`` that is under way updates."""
        return Firing((True,) * (2 * len(self.pairs)), first=True, last=True)

    def end_firing(self) -> None:
        """The call of ``optimizer.step`` is over."""

    def publish_weights(self, in_step: bool) -> None:
        """Copy changed masters to the weights that the model computes with, where these are separate.

        Args:
            in_step: called from within the training step, in which the engine publishes some of them itself.

        Communication: as the engine's own; every rank must call.
        """

    @property
    def state_name(self) -> str:
        return self.name

    def require_wrapped(self, model: nn.Module) -> None:
        """Make sure that the model is the one that the engine saves by.

        Raises:
            ValueError: it is the bare model inside.
        """

    def write_masters(self, values: Mapping[Tensor, Tensor]) -> None:
        """Put whole values into this rank's part of the masters, where these are separate from the weights.

        Args:
            values: by the model's parameter; what is not trained is left out.
        """

    def check(self) -> None:
        """Make sure that the factors still lie where they lay at attach time.

        Raises:
            RuntimeError: the model was sharded, or its optimizer replaced, in the meantime.
        """

    def _check_pieces(self) -> None:
        """Make sure that this rank holds what the layouts say.

        Raises:
            ValueError: it does not.
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
        # Looked up in every step, since accelerate and FSDP2 replace parameters; in the dictionary where nn.Module's
        # attributes end, since the way there takes longer than the step's algebra on a GPU.
        return [
            factor if (factor := module._parameters.get(name)) is not None else getattr(module, name)
            for module, name in self._owners
        ]

    def _factor_names(self) -> list[str]:
        return [f"{pair.name}.{side}" for pair in self.pairs for side in ("lora_A", "lora_B")]
