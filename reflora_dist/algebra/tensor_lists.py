"""Sums over each tensor of a list, and products of each tensor with a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels


class PerTensor:
    """Operations on lists of tensors; on a GPU each takes a few launches, whatever the number of tensors.

    Args:
        device: the device of most tensors. Tensors elsewhere (of an offloaded optimizer) work, but slower.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernels = None
        if kernels.usable(device):
            from .kernels.tensor_lists import PerTensorKernels  # imports Triton, which not every machine has

            self._kernels = PerTensorKernels(device)

    def magnitudes(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sum of absolute values of every tensor, ``[tensors]`` float64."""
        return self._totals(tensors, squared=False)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sum of squares of every tensor, ``[tensors]`` float64."""
        return self._totals(tensors, squared=True)

    def _totals(self, tensors: Sequence[Tensor], squared: bool) -> Tensor:
        if self._kernels is not None and (located := self._kernels.locate("sums", tensors)) is not None:
            return self._kernels.totals(located, squared)
        norms = torch._foreach_norm(list(tensors), 2 if squared else 1, dtype=torch.float64)
        totals = torch.stack([norm.to(norms[0].device) for norm in norms])
        return totals.square() if squared else totals

    def scale_(self, name: str, tensors: Sequence[Tensor | None], factors: Tensor) -> None:
        """Multiply every tensor in place by its entry of ``factors``.

        Args:
            name: a name for the list, under which the kernels remember the addresses of its tensors.
            tensors: the tensors; None is skipped.
            factors: ``[tensors]`` float64, on the device of most tensors.
        """
        if self._kernels is not None and (located := self._kernels.locate(name, tensors)) is not None:
            self._kernels.scale_(located, factors)
            return
        present = [(index, tensor) for index, tensor in enumerate(tensors) if tensor is not None and tensor.numel()]
        if present:
            copies = {device: factors.to(device) for device in {tensor.device for _, tensor in present}}
            scales = [copies[tensor.device][index] for index, tensor in present]
            torch._foreach_mul_([tensor for _, tensor in present], scales)
