"""Matrices of a known condition number, and how far two are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def factor(rows: int, lora_rank: int, condition: float, seed: int) -> torch.Tensor:
    """A tall factor ``[rows, r]`` float64 with singular values from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, lora_rank, generator=generator, dtype=torch.float64)
    u, _, v_t = torch.linalg.svd(matrix, full_matrices=False)
    exponents = torch.linspace(0, -float(torch.tensor(condition).log10()), lora_rank, dtype=torch.float64)
    return (u * 10**exponents) @ v_t


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(value - exact) / torch.linalg.norm(exact))


def positive_definite(r: int, condition: float, seed: int, scale: float) -> Tensor:
    """Symmetric positive definite with this condition number."""
    square = factor(r, r, condition, seed)
    left, values, _ = torch.linalg.svd(square)
    return scale * (left * values) @ left.mT
