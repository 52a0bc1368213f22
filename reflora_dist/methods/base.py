"""What a method has to say about a step; everything else is done for it.

Written tall, the factors are ``X_A = A^T`` ``[in, r]`` and ``X_B = B`` ``[out, r]``. A method gets Gram matrices of
whole tall factors and answers with small matrices; it never sees a factor, a rank or an engine.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from ..algebra.types import Matrices


class Settings(Protocol):
    """Settings of :class:`~reflora_dist.RefLoRAConfig` that a method may read."""

    @property
    def damping(self) -> float:
        """What scaled-gd adds to the Grams' diagonal."""


class Method:
    """A method and what the rest of the package needs to know of it. This one does nothing: plain LoRA.

    Attributes:
        name: for ``RefLoRAConfig(method=...)`` and command lines.
        acts: whether it does anything.
        default_warmup_steps: steps of plain LoRA before its first, if the user names none. PEFT starts with
            ``lora_B = 0``; a method that does nothing there needs some, or Adam meets gradients of another scale.
        has_schedule: whether ``warmup_steps`` and ``interval`` mean anything to it.
        own_settings: fields of the configuration that mean something to this method alone.
        needs_full_rank: whether it exists only where both Grams have an inverse, so never with r above in or out.
        gram_width: its Gram matrices are ``gram_width * r`` wide.
        channels_there, channels_back: how many tensors of a factor's size go to where their rows are whole, and return.
    """

    name: ClassVar[str]
    acts: ClassVar[bool] = True
    default_warmup_steps: ClassVar[int] = 0
    has_schedule: ClassVar[bool] = True
    own_settings: ClassVar[frozenset[str]] = frozenset()
    needs_full_rank: ClassVar[bool] = False
    gram_width: ClassVar[int] = 0
    channels_there: ClassVar[int] = 0
    channels_back: ClassVar[int] = 0

    @classmethod
    def reduced_values(cls, lora_rank: int) -> int:
        """How many float64 numbers of a pair are summed over ranks in a step: the upper triangles of two Grams."""
        width = cls.gram_width * lora_rank
        return width * (width + 1)

    @classmethod
    def solution_values(cls, lora_rank: int) -> int:
        """How many float64 numbers of a pair ranks send where they share the solve out; 0 if they never do."""
        return 0


class Transform(NamedTuple):
    """Gradients, written tall, become ``grad_X M``.

    A method that ``uses_gradients`` multiplies ``[X, grad_X]`` instead, with matrices ``[2, P_r, 2 r, r]``.

    Attributes:
        matrices: ``{r: [2, P_r, r, r]}`` float64, for lora_A's side and for lora_B's; symmetric (but for a method that
            ``uses_gradients``).
        solved: ``{r: [P_r]}`` bool; False where the pair is left as plain LoRA in this step.
    """

    matrices: Matrices
    solved: dict[int, Tensor]


class GradientMethod(Method, abc.ABC):
    """A method that replaces the gradients right before the optimizer reads them.

    Args:
        settings: the method's own.
        scaling: ``{r: [P_r]}`` float64, s of every pair's update ``s B A``; empty unless the method ``uses_gradients``.

    Attributes:
        uses_gradients: whether it needs more than the Grams of the factors; then ``gram_width`` is 2. A method that
            does not may be asked for some of the pairs, any of them.
    """

    uses_gradients: ClassVar[bool] = False
    gram_width = 1
    channels_there = 2  # weights, gradients
    channels_back = 1

    def __init__(self, settings: Settings, scaling: Matrices) -> None:
        self.settings = settings
        self.scaling = scaling

    @classmethod
    def solution_values(cls, lora_rank: int) -> int:
        """Two matrices, and whether the pair is solved; upper triangles of symmetric ones."""
        if cls.uses_gradients:
            return 1 + 2 * cls.gram_width * lora_rank * lora_rank
        return 1 + lora_rank * (lora_rank + 1)

    @abc.abstractmethod
    def solve(self, grams: Matrices) -> Transform:
        """What to do to the gradients of every pair of which there are Grams.

        Args:
            grams: ``{r: [2, P_r, r, r]}`` float64, ``A A^T`` and ``B^T B``. For a method that ``uses_gradients``
                ``{r: [2, P_r, 2 r, 2 r]}``, of ``[A^T, grad_A^T]`` and ``[B, grad_B]``. There lora_A's and lora_B's
                gradients may not be known at the same time: the matrix of one side must not depend on the other side's
                gradient, nor on the Gram of gradients with themselves.
        """


class Rescaling(NamedTuple):
    """Factors become ``factor_a A`` and ``B / factor_a``, Adam's moments follow.

    Attributes:
        factor_a: ``[P]`` float64.
        solved: ``[P]`` bool; False where the pair is left as it is.
    """

    factor_a: Tensor
    solved: Tensor


class RescalingMethod(Method, abc.ABC):
    """A method that rescales the factors, and Adam's moments, right after the optimizer has updated them."""

    @classmethod
    def reduced_values(cls, lora_rank: int) -> int:
        """Two squared norms."""
        return 2

    @abc.abstractmethod
    def solve(self, squared_norms: Tensor) -> Rescaling:
        """From ``[2, P]`` float64: ``|A|_F^2`` and ``|B|_F^2`` of the whole factors."""


class OptimizerMethod(Method):
    """A method that is an optimizer itself, and acts in every step."""

    has_schedule = False
