"""Figures of the last step in which a method acted, for logs. They stay on the device until they are asked for."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..algebra.types import Matrices


class Stopwatch:
    """Times the laps of a step. On a GPU it records events and waits for them in :meth:`milliseconds` only.

    Args:
        device: the device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # reused in every step
        self._count = 0
        self._begun = 0.0
        self._seconds = 0.0

    def start(self, *, new_step: bool) -> None:
        """Begin a lap; ``new_step`` discards the laps of the step before."""
        if new_step:
            self._count, self._seconds = 0, 0.0
        if self._device.type == "cuda":
            if self._count == len(self._laps):
                self._laps.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._laps[self._count][0].record(torch.cuda.current_stream(self._device))
        else:
            self._begun = time.perf_counter()

    def stop(self) -> None:
        """End the lap."""
        if self._device.type == "cuda":
            self._laps[self._count][1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds += time.perf_counter() - self._begun
        self._count += 1

    def milliseconds(self) -> float:
        """Return the milliseconds of all laps of the last step. Waits for the device."""
        milliseconds = 1e3 * self._seconds
        for begin, end in self._laps[: self._count]:
            end.synchronize()
            milliseconds += begin.elapsed_time(end)
        return milliseconds


def gram_figures(grams: Matrices) -> dict[str, float]:
    """Return the conditioning of Gram matrices and the balance of their factors. Waits for the device.

    Args:
        grams: ``{r: [2, P_r, r, r]}`` float64, ``A A^T`` and ``B^T B``.

    Returns:
        ``gram_condition_median`` and ``gram_condition_max`` over all factors of full rank, and the figures of
        :func:`balance_figures`. A Gram matrix's condition number is the ratio of its largest to its smallest
        eigenvalue, the square of the factor's. A figure that no pair has is left out, so every value is finite.
    """
    conditions, squared_norms = [], []
    for lora_rank, both in grams.items():
        on_host = both.cpu()
        squared_norms.append(torch.diagonal(on_host, dim1=-2, dim2=-1).sum(dim=-1))
        finite = on_host.isfinite().flatten(-2).all(dim=-1)
        eigenvalues = torch.linalg.eigvalsh(on_host[finite])
        smallest, largest = eigenvalues[:, 0], eigenvalues[:, -1]
        full_rank = smallest > lora_rank * torch.finfo(torch.float64).eps * largest
        conditions.append((largest / smallest)[full_rank])
    figures = {}
    found = torch.cat(conditions)
    if found.numel():
        figures = {"gram_condition_median": float(found.median()), "gram_condition_max": float(found.max())}
    return figures | balance_figures(torch.cat(squared_norms, dim=1))


def change_of_gradients(grams: Matrices, matrices: Matrices) -> Tensor:
    """Return the squared norms of all gradients and of their changes, ``[2]`` float64 on the device.

    With ``X = [X_1, ..., grad]`` and the new gradient ``X M``, the change is ``X D``, where D is M without the matrix
    that leaves the gradient as it is. Its squared norm is the trace of ``D^T X^T X D``.

    Args:
        grams: ``{r: [2, P_r, k r, k r]}`` float64, ``X^T X`` over any rows.
        matrices: M, ``{r: [2, P_r, k r, r]}`` float64.
    """
    totals = []
    for r, factors in matrices.items():
        difference = factors.clone()
        diagonal = torch.diagonal(difference[..., -r:, :], dim1=-2, dim2=-1)
        diagonal -= 1
        changed = (difference * (grams[r] @ difference)).sum()
        gradients = torch.diagonal(grams[r][..., -r:, -r:], dim1=-2, dim2=-1).sum()
        totals.append(torch.stack([gradients, changed]))
    return torch.stack(totals).sum(dim=0)


def balance_figures(squared_norms: Tensor) -> dict[str, float]:
    """Return the balance of the factors. Waits for the device.

    Args:
        squared_norms: ``[2, P]`` float64, ``|A|_F^2`` and ``|B|_F^2``.

    Returns:
        ``balance_min``, ``balance_median`` and ``balance_max`` of ``|A|_F / |B|_F`` over the pairs without a zero
        factor; an empty dictionary if there is no such pair.
    """
    balance = (squared_norms[0] / squared_norms[1]).sqrt().cpu()
    balance = balance[balance.isfinite() & (balance > 0)]
    if not balance.numel():
        return {}
    values = {"min": balance.min(), "median": balance.median(), "max": balance.max()}
    return {f"balance_{name}": float(value) for name, value in values.items()}


def balance_after(squared_norms: Tensor) -> dict[str, float]:
    """Return ``balance_after_median`` of factors with these squared norms, as :func:`balance_figures` does."""
    found = balance_figures(squared_norms)
    return {"balance_after_median": found["balance_median"]} if found else {}
