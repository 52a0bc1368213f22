"""The interface of a method.

Written tall, the factors are ``X_A = A^T`` ``[in, r]`` and ``X_B = B`` ``[out, r]``. A method receives Gram matrices of
whole tall factors and returns small matrices or scalars. It never sees a factor, a rank or an engine.
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
        """The number that scaled-gd adds to the diagonal of the Gram matrices."""

    @property
    def carry_moments(self) -> bool:
        """Whether Adam's moments become those of the method's coordinates."""


class Method:
    """A method, and the facts about it that the rest of the package needs. The defaults describe plain LoRA.

    Attributes:
        name: the name in ``RefLoRAConfig(method=...)`` and on command lines.
        acts: whether the method does anything.
        default_warmup_steps: steps of plain LoRA before the method's first step, unless the user sets a number. PEFT
            starts with ``lora_B = 0``. A method that does nothing there needs a warm-up; without one, Adam's moments
            hold gradients of another scale when it begins to act.
        has_schedule: whether the method uses ``warmup_steps`` and ``interval``.
        own_settings: fields of the configuration that only this method uses.
        needs_full_rank: whether the method exists only if both Gram matrices are regular, so never for r > in or
            r > out.
        gram_width: the method's Gram matrices are ``gram_width * r`` wide.
        channels_there: number of tensors of a factor's size that are sent to the ranks that compute on whole rows.
        channels_back: number of those tensors that return.
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
        """Return how many float64 numbers per pair a step sums over ranks: the upper triangles of two Grams."""
        width = cls.gram_width * lora_rank
        return width * (width + 1)

    @classmethod
    def solution_values(cls, lora_rank: int) -> int:
        """Return how many float64 numbers per pair are sent if ranks divide the solves; 0 if they never do."""
        return 0

    @classmethod
    def carries_moments(cls, settings: Settings) -> bool:
        """Return whether the method rewrites Adam's moments, and so needs one of the Adam family."""
        return False

    @classmethod
    def channels(cls, settings: Settings) -> tuple[int, int]:
        """Return how many tensors of a factor's size are sent in a step, and how many return."""
        return cls.channels_there, cls.channels_back


class Transform(NamedTuple):
    """The result of a matrix method: matrices M that turn gradients or factors, written tall, into ``X M``.

    For a method with ``uses_gradients`` M is ``[2 r, r]``, and the new gradient is ``[X, grad_X] M``.

    Attributes:
        matrices: M for lora_A's side and for lora_B's, ``{r: [2, P_r, r, r]}`` float64. With ``uses_gradients``
            ``{r: [2, P_r, 2 r, r]}``.
        solved: ``{r: [P_r]}`` bool; False for a pair that stays plain LoRA in this step.
    """

    matrices: Matrices
    solved: dict[int, Tensor]


class MatrixMethod(Method, abc.ABC):
    """A method that multiplies tall matrices by small ones, which it finds from Gram matrices.

    Args:
        settings: the configuration's fields for methods.
        scaling: ``{r: [P_r]}`` float64, s of every pair's update ``s B A``; empty unless ``uses_gradients``.

    Attributes:
        symmetric: whether M is symmetric; then ranks send upper triangles of it.
        uses_gradients: whether the method needs Gram matrices of factors and gradients together; ``gram_width`` is then
            2. Otherwise any subset of the pairs may be passed to ``solve``.
    """

    symmetric: ClassVar[bool] = True
    uses_gradients: ClassVar[bool] = False
    gram_width = 1

    def __init__(self, settings: Settings, scaling: Matrices) -> None:
        self.settings = settings
        self.scaling = scaling

    @classmethod
    def solution_values(cls, lora_rank: int) -> int:
        """Count two matrices (symmetric ones as upper triangles) and the flag of a solved pair."""
        if cls.symmetric:
            return 1 + lora_rank * (lora_rank + 1)
        return 1 + 2 * cls.gram_width * lora_rank * lora_rank

    @classmethod
    def carries_moments(cls, settings: Settings) -> bool:
        return settings.carry_moments

    @abc.abstractmethod
    def solve(self, grams: Matrices) -> Transform:
        """Return the matrices for every pair in ``grams``.

        Args:
            grams: ``{r: [2, P_r, r, r]}`` float64, ``A A^T`` and ``B^T B``. With ``uses_gradients``
                ``{r: [2, P_r, 2 r, 2 r]}``, the Grams of ``[A^T, grad_A^T]`` and ``[B, grad_B]``. In that case the
                gradients of lora_A and of lora_B may be known at different times. So the matrix of one side must not
                depend on the other side's gradient, nor on the Gram of the gradient with itself.
        """


class GradientMethod(MatrixMethod):
    """A method that replaces the gradients right before the optimizer reads them.

    If it carries Adam's moments, it does so once, in its first step: those of plain LoRA's gradients become what they
    would be, had these been replaced by that step's matrices.
    """

    channels_there = 2  # weights and gradients
    channels_back = 1


class FactorMethod(MatrixMethod):
    """A method that replaces the factors right after the optimizer's update by others with the same product.

    The matrices of its two sides satisfy ``M_B = M_A^-T``, so ``B M_B (A^T M_A)^T = B A``.
    """

    symmetric = False
    channels_there = 1
    channels_back = 1

    @classmethod
    def channels(cls, settings: Settings) -> tuple[int, int]:
        """Count two moments of Adam too if they are carried along, which happens in every step."""
        moments = 2 if cls.carries_moments(settings) else 0
        return cls.channels_there + moments, cls.channels_back + moments


class Rescaling(NamedTuple):
    """The result of a rescaling method: factors become ``factor_a A`` and ``B / factor_a``, and Adam's moments match.

    Attributes:
        factor_a: ``[P]`` float64.
        solved: ``[P]`` bool; False for a pair that stays unchanged.
    """

    factor_a: Tensor
    solved: Tensor


class RescalingMethod(Method, abc.ABC):
    """A method that rescales the factors and Adam's moments right after the optimizer's update."""

    @classmethod
    def reduced_values(cls, lora_rank: int) -> int:
        """Count two squared norms."""
        return 2

    @classmethod
    def carries_moments(cls, settings: Settings) -> bool:
        return True

    @abc.abstractmethod
    def solve(self, squared_norms: Tensor) -> Rescaling:
        """Return the scale of every pair.

        Args:
            squared_norms: ``[2, P]`` float64, ``|A|_F^2`` and ``|B|_F^2`` of the whole factors.
        """


class OptimizerMethod(Method):
    """A method that is an optimizer itself and acts in every step."""

    has_schedule = False

    @classmethod
    def packed_values(cls, lora_rank: int) -> int:
        """Return how many numbers of its own the method keeps in the second moment's elements of a factor."""
        return 0
