"""ScaledGD, LoRA-Pro, LoRA-RITE, LoRA-Muon and BaLoRA on whole factors in one process, as plain as their papers.

The oracles of the sharded implementations: float64, a loop over pairs, and other algebra than theirs. ScaledGD solves
with the damped Grams, LoRA-Pro takes its Sylvester equation apart with eigenvectors, LoRA-RITE goes by QR
factorizations and keeps moments in the basis of the step before, LoRA-Muon takes singular values, and BaLoRA takes
singular vectors of the factors' product. RefLoRA's are in ``reflora_dist.methods.reference``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reflora_dist import RefLoRAConfig
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.methods.reference import refactored, refactorization
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.workloads import Factors, Settings, Workload, build_model, train_single

Pair = tuple[Tensor, Tensor]
"""Something of lora_A and something of lora_B."""


def scaled_gd(lora_a: Tensor, lora_b: Tensor, grad_a: Tensor, grad_b: Tensor, damping: float) -> Pair:
    """``(B^T B + delta I)^-1 grad_A`` and ``grad_B (A A^T + delta I)^-1``."""
    damped = damping * torch.eye(lora_a.shape[0], dtype=lora_a.dtype)
    new_a = torch.linalg.solve(lora_b.mT @ lora_b + damped, grad_a)
    new_b = torch.linalg.solve(lora_a @ lora_a.mT + damped, grad_b.mT).mT
    return new_a, new_b


def lora_pro(
    lora_a: Tensor, lora_b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float, x: Tensor | None = None
) -> Pair:
    """Theorem 2.1 there with the X of theorem 2.3, or a given one; unchanged where a factor is rank-deficient."""
    rank = lora_a.shape[0]
    if min(torch.linalg.matrix_rank(lora_a), torch.linalg.matrix_rank(lora_b)) < rank:
        return grad_a, grad_b
    gram_a, gram_b = lora_a @ lora_a.mT, lora_b.mT @ lora_b
    natural_a = torch.linalg.solve(gram_b, grad_a) / scaling**2
    natural_b = torch.linalg.solve(gram_a, grad_b.mT).mT / scaling**2
    natural_b = natural_b - lora_b @ torch.linalg.lstsq(lora_b, natural_b).solution
    if x is None:
        values_a, vectors_a = torch.linalg.eigh(gram_a)
        values_b, vectors_b = torch.linalg.eigh(gram_b)
        right_side = vectors_b.mT @ (-natural_a @ lora_a.mT) @ vectors_a
        x = vectors_b @ (right_side / (values_b[:, None] + values_a)) @ vectors_a.mT
    return natural_a + x @ lora_a, natural_b - lora_b @ x


def new_gradients(
    config: RefLoRAConfig, lora_a: Tensor, lora_b: Tensor, grad_a: Tensor, grad_b: Tensor, scaling: float
) -> Pair:
    """What a method makes of a pair's gradients."""
    tensors = (lora_a.double(), lora_b.double(), grad_a.double(), grad_b.double())
    match config.method:
        case "scaled-gd":
            return scaled_gd(*tensors, config.damping)
        case "lora-pro":
            return lora_pro(*tensors, scaling)
        case "reflora":
            return refactored(*tensors)
    return tensors[2], tensors[3]


class GradientOracle:
    """Hooks a gradient method into a torch optimizer that holds a PEFT model's whole factors."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: RefLoRAConfig) -> None:
        self._pairs = find_pairs(model)
        self._optimizer = optimizer
        self._config = config
        self._steps = 0
        optimizer.register_step_pre_hook(lambda *_: self._before())

    def _before(self) -> None:
        if self._config.is_due(self._steps):
            for pair in self._pairs:
                lora_a, lora_b = pair.lora_a, pair.lora_b
                assert lora_a.grad is not None and lora_b.grad is not None
                if self._config.carry_moments and self._steps == self._config.warmup_steps:
                    self._carry_moments(lora_a, lora_b)
                grad_a, grad_b = new_gradients(
                    self._config, lora_a.detach(), lora_b.detach(), lora_a.grad, lora_b.grad, pair.scaling
                )
                lora_a.grad.copy_(grad_a)
                lora_b.grad.copy_(grad_b)
        self._steps += 1

    @torch.no_grad()
    def _carry_moments(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """RefLoRA's, as if a gradient's components in a row were uncorrelated."""
        solution = refactorization(lora_a.detach(), lora_b.detach())
        if solution is None:
            return
        of_b, of_a = solution
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("max_exp_avg_sq", 2)):
            for factor, matrix in ((lora_a, of_a), (lora_b, of_b)):
                moment = self._optimizer.state[factor].get(key)
                if moment is not None:
                    moment.copy_(matrix**power @ moment if factor is lora_a else moment @ matrix**power)


def balanced(lora_a: Tensor, lora_b: Tensor) -> Pair | None:
    """``Sigma^1/2 V^T`` and ``U Sigma^1/2`` of ``B A = U Sigma V^T``; None where a factor is rank-deficient.

    The signs of the singular vectors keep every direction closest to the one before.
    """
    rank = lora_a.shape[0]
    if min(torch.linalg.matrix_rank(lora_a), torch.linalg.matrix_rank(lora_b)) < rank:
        return None
    u, sigma, v_t = torch.linalg.svd(lora_b @ lora_a, full_matrices=False)
    roots = sigma[:rank].sqrt()
    new_a, new_b = roots[:, None] * v_t[:rank], u[:, :rank] * roots
    signs = torch.where((new_a * lora_a).sum(dim=1) + (new_b * lora_b).sum(dim=0) < 0, -1.0, 1.0)
    return signs[:, None] * new_a, new_b * signs


@torch.no_grad()
def balance_(lora_a: Tensor, lora_b: Tensor, optimizer: torch.optim.Optimizer, carry_moments: bool) -> None:
    """Balance a pair in place.

    The gradients of new factors ``N A`` and ``B N^-1`` are ``N^-T grad_A`` and ``grad_B N^T``.
    """
    found = balanced(lora_a.detach(), lora_b.detach())
    if found is None:
        return
    new_a, new_b = found
    of_grad_a = torch.linalg.lstsq(lora_b, new_b).solution.mT
    of_grad_b = torch.linalg.lstsq(lora_a.mT, new_a.mT).solution
    for tensor, new in ((lora_a, new_a), (lora_b, new_b)):
        tensor.copy_(new)
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("max_exp_avg_sq", 2)):
        if carry_moments and key in optimizer.state.get(lora_a, {}):
            of_a, of_b = (optimizer.state[factor][key] for factor in (lora_a, lora_b))
            of_a.copy_(of_grad_a**power @ of_a)
            of_b.copy_(of_b @ of_grad_b**power)


class BalanceOracle:
    """BaLoRA as hooks of a torch optimizer that holds a PEFT model's whole factors."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: RefLoRAConfig) -> None:
        self._pairs = find_pairs(model)
        self._optimizer = optimizer
        self._config = config
        self._steps = -1
        optimizer.register_step_post_hook(lambda *_: self._after())
        self._after()

    def _after(self) -> None:
        self._steps += 1
        if self._config.is_due(self._steps):
            for pair in self._pairs:
                balance_(pair.lora_a, pair.lora_b, self._optimizer, self._config.carry_moments)


@dataclasses.dataclass
class _Side:
    """A tall factor ``[rows, r]`` and what LoRA-RITE keeps of it; ``other`` is of the other factor of the pair."""

    parameter: Tensor
    is_a: bool
    group: dict[str, Any]
    other_basis: Tensor
    moment: Tensor
    second: Tensor
    escape: float = 0.0

    def tall(self, tensor: Tensor) -> Tensor:
        return tensor.detach().double().mT if self.is_a else tensor.detach().double()


class RiteOracle(torch.optim.Optimizer):
    """LoRA-RITE, algorithm 1: parameters are lora_A, lora_B, lora_A, ... in every group."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        clip_unmagnified_grad: float = 1.0,
        update_capping: float = 0.0,
        update_skipping: float = 1.0,
        weight_decay: float = 0.0,
        apply_escape: bool = False,
        balance_param: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._betas, self._eps = betas, eps
        self._clip, self._capping, self._skipping = clip_unmagnified_grad, update_capping, update_skipping
        self._apply_escape, self._balance = apply_escape, balance_param
        self._steps = 0
        self.skipped_pairs = 0
        self._pairs: list[tuple[_Side, _Side]] = []
        for group in self.param_groups:
            parameters = group["params"]
            for pair in zip(parameters[0::2], parameters[1::2], strict=True):
                self._pairs.append((self._side(pair, 0, group), self._side(pair, 1, group)))

    @staticmethod
    def _side(pair: Pair, side: int, group: dict[str, Any]) -> _Side:
        lora_rank = pair[0].shape[0]
        rows = (pair[0].shape[1], pair[1].shape[0])
        zeros = [torch.zeros(number, lora_rank, dtype=torch.float64) for number in (rows[1 - side], rows[side])]
        second = torch.zeros(lora_rank, lora_rank, dtype=torch.float64)
        return _Side(pair[side], side == 0, group, zeros[0], zeros[1], second)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        work = []
        for sides in self._pairs:
            bases, triangles = zip(*(torch.linalg.qr(side.tall(side.parameter)) for side in sides), strict=True)
            inverses = [torch.linalg.pinv(triangle) for triangle in triangles]
            gradients, skipped = [], False
            for number, side in enumerate(sides):
                unmagnified = side.tall(side.parameter.grad) @ inverses[1 - number]
                if self._skipping and unmagnified.square().mean().sqrt() > self._skipping:
                    unmagnified, skipped = torch.zeros_like(unmagnified), True
                gradients.append(unmagnified)
            self.skipped_pairs += skipped
            work.append((bases, inverses, gradients))
        norm = sum(float(g.square().sum()) for *_, gradients in work for g in gradients) ** 0.5
        clip = self._clip / norm if self._clip and norm > self._clip else 1.0
        for sides, (bases, inverses, gradients) in zip(self._pairs, work, strict=True):
            updates = [
                self._update(side, clip * gradients[number], bases[1 - number]) @ inverses[1 - number].mT
                for number, side in enumerate(sides)
            ]
            talls = [
                side.tall(side.parameter) * (1 - side.group["lr"] * side.group["weight_decay"])
                - side.group["lr"] * update
                for side, update in zip(sides, updates, strict=True)
            ]
            if self._balance:
                norms = [float(tall.norm()) + 1e-6 for tall in talls]
                target = (norms[0] * norms[1]) ** 0.5
                talls = [tall * target / size for tall, size in zip(talls, norms, strict=True)]
            for side, tall in zip(sides, talls, strict=True):
                side.parameter.copy_(tall.mT if side.is_a else tall)
        self._steps += 1

    def _update(self, side: _Side, gradient: Tensor, basis: Tensor) -> Tensor:
        """The unmagnified update, in the basis of the other factor; moments turn into that basis first."""
        beta1, beta2 = (beta * (1 - beta**self._steps) / (1 - beta ** (self._steps + 1)) for beta in self._betas)
        turn = basis.mT @ side.other_basis
        turned = turn @ side.second @ turn.mT
        if self._apply_escape:
            loss = (torch.linalg.eigvalsh(side.second) - torch.linalg.eigvalsh(turned)).max().clamp_min(0.0)
            trace_loss = (side.second.trace() - turned.trace()).clamp_min(0.0)
            side.escape = beta2 * (side.escape + float(torch.minimum(loss, trace_loss)))
        side.second = beta2 * turned + (1 - beta2) * gradient.mT @ gradient / gradient.shape[0]
        side.second = 0.5 * (side.second + side.second.mT)
        values, vectors = torch.linalg.eigh(side.second)
        inverse_root = (vectors / ((values.clamp_min(0.0) + side.escape).sqrt() + self._eps)) @ vectors.mT
        side.moment = beta1 * side.moment @ turn.mT + (1 - beta1) * gradient @ inverse_root
        side.other_basis = basis
        size = float(side.moment.square().mean().sqrt())
        return side.moment / max(1.0, size / self._capping) if self._capping else side.moment


class MuonOracle(torch.optim.Optimizer):
    """LoRA-Muon, algorithm 1 on ``W = s B A``: parameters are lora_A, lora_B, lora_A, ... in every group."""

    def __init__(
        self,
        params: Any,
        scalings: Sequence[float],
        lr: float,
        momentum: float = 0.95,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.skipped_pairs = 0
        self._scalings = scalings
        self._factors = [parameter for group in self.param_groups for parameter in group["params"]]
        self.groups = [group for group in self.param_groups for _ in group["params"]]
        self._moments = [torch.zeros_like(factor, dtype=torch.float64) for factor in self._factors]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for pair, scaling in enumerate(self._scalings):
            numbers = (2 * pair, 2 * pair + 1)
            talls = [_tall(number, self._factors[number].detach().double()) for number in numbers]
            roots = [_inverse_root(tall) for tall in talls]
            self.skipped_pairs += any(torch.linalg.matrix_rank(tall, rtol=1e-6) < tall.shape[1] for tall in talls)
            for number, tall, root in zip(numbers, talls, reversed(roots), strict=True):
                group, factor = self.groups[number], self._factors[number]
                gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
                moment = self._moments[number].lerp_(gradient.double(), 1 - group["momentum"])
                step = -group["lr"] / 2 * _sign(_tall(number, moment) @ root) @ root / scaling
                decay = (1 - group["lr"] * group["weight_decay"]) ** 0.5
                factor.copy_(_tall(number, decay * tall + step / decay))


def _tall(number: int, tensor: Tensor) -> Tensor:
    """Something of lora_A, whose number is even, transposed, and of lora_B as it is."""
    return tensor if number % 2 else tensor.mT


def _inverse_root(tall: Tensor) -> Tensor:
    """``(X^T X)^(-1/2)`` from the singular values of X, of which small ones count as infinite."""
    _, values, vectors = torch.linalg.svd(tall, full_matrices=False)
    inverse = torch.where(values > 1e-6 * values.norm(), 1 / values, 0.0)
    return vectors.mT @ (inverse[:, None] * vectors)


def _sign(matrix: Tensor) -> Tensor:
    """``U V^T`` of the singular value decomposition, without the directions of small values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * (values > 1e-6 * values.norm())) @ right


def scalings_of(model: nn.Module) -> list[float]:
    """s of every pair's ``s B A``."""
    return [pair.scaling for pair in find_pairs(model)]


def factors_in_pairs(model: nn.Module) -> list[Tensor]:
    """lora_A, lora_B, lora_A, ... as `RiteOracle` takes them."""
    return [factor for pair in find_pairs(model) for factor in (pair.lora_a, pair.lora_b)]


def oracle_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The oracle of the method whose optimizer the settings name, over a model's whole factors."""
    factors = factors_in_pairs(model)
    if settings.muon is not None:
        return MuonOracle(factors, scalings_of(model), **settings.lora_muon())
    return RiteOracle(factors, **settings.lora_rite())


def train_oracle(
    model: nn.Module, batches: Tensor, settings: Settings, config: RefLoRAConfig
) -> tuple[list[float], Factors]:
    """`train_single` under a method's oracle. Returns losses and final factors."""
    if config.method in METHOD_OPTIMIZERS:
        return train_single(model, batches, settings, optimizer=oracle_of(model, settings))
    oracle = BalanceOracle if config.method == "balora" else GradientOracle
    return train_single(model, batches, settings, lambda m, o: oracle(m, o, config))


def trained_in_float64(
    workload: Workload, settings: Settings, config: RefLoRAConfig, **model: Any
) -> tuple[list[float], Factors]:
    """`train_oracle` on a workload's model, everything in float64; ``model`` goes to ``build_model``."""
    return train_oracle(build_model(workload, dtype=torch.float64, **model), workload.batches, settings, config)
