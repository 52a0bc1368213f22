"""What a method has to say about a step; everything else is done for it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..blocks import Matrices


class Transform(NamedTuple):
    """Gradients become ``left grad_A`` and ``grad_B right``.

    Attributes:
        left, right: ``{r: [P_r, r, r]}`` float64.
        solved: ``{r: [P_r]}`` bool; False where the pair is left as plain LoRA in this step.
    """

    left: Matrices
    right: Matrices
    solved: dict[int, Tensor]


class GradientMethod(Protocol):
    """A method that replaces the gradients right before the optimizer reads them."""

    def solve(self, grams: Matrices) -> Transform:
        """From the Grams of the whole factors, ``{r: [2, P_r, r, r]}`` float64 (``A A^T``, ``B^T B``)."""
        ...


class Rescaling(NamedTuple):
    """Factors become ``factor_a A`` and ``B / factor_a``, Adam's moments follow.

    Attributes:
        factor_a: ``[P]`` float64.
        solved: ``[P]`` bool; False where the pair is left as it is.
    """

    factor_a: Tensor
    solved: Tensor


class RescalingMethod(Protocol):
    """A method that rescales the factors right after the optimizer has updated them."""

    def solve(self, squared_norms: Tensor) -> Rescaling:
        """From ``[2, P]`` float64: ``|A|_F^2`` and ``|B|_F^2`` of the whole factors."""
        ...
