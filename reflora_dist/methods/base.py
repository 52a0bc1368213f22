"""What a method has to say about a step; everything else is done for it.

Written tall, the factors are ``X_A = A^T`` ``[in, r]`` and ``X_B = B`` ``[out, r]``. A method gets Gram matrices of
whole tall factors and answers with small matrices; it never sees a factor, a rank or an engine.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

from torch import Tensor

from ..algebra.types import Matrices
from .config import RefLoRAConfig


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


class GradientMethod(abc.ABC):
    """A method that replaces the gradients right before the optimizer reads them.

    Args:
        config: with the method's own settings.
        scaling: ``{r: [P_r]}`` float64, s of every pair's update ``s B A``; empty unless the method ``uses_gradients``.

    Attributes:
        uses_gradients: whether it needs more than the Grams of the factors. A method that does not may be asked for
            some of the pairs, any of them.
    """

    uses_gradients = False

    def __init__(self, config: RefLoRAConfig, scaling: Matrices) -> None:
        self.config = config
        self.scaling = scaling

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


class RescalingMethod(abc.ABC):
    """A method that rescales the factors right after the optimizer has updated them."""

    @abc.abstractmethod
    def solve(self, squared_norms: Tensor) -> Rescaling:
        """From ``[2, P]`` float64: ``|A|_F^2`` and ``|B|_F^2`` of the whole factors."""
