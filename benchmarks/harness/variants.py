"""The variants that the benchmarks compare: list them, install them, and check that they agree.

``lora`` (nothing is done to the gradients), ``reflora``, ``reflora-s`` and the other methods of this package, ``loop``,
``gather-coalesced`` and ``gather-each`` (``baselines``: RefLoRA's result by other means), ``riemannian`` (PEFT's
preconditioned optimizer, the method of ``scaled-gd``). The suffix ``-flat`` means the same variant on a model of its
own that stores lora_A as PEFT does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.baselines import Gather, Loop
from benchmarks.harness.engines import Trainee
from reflora_dist import Handle, RefLoRAConfig, attach
from reflora_dist.engines.base import Engine
from reflora_dist.engines.find import find_engine
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS

FLAT = "-flat"
_WHOLE = (*METHODS, "loop", "riemannian")
_SHARDED = (*METHODS, "gather-coalesced", "gather-each")
_SAME_RESULT = ("reflora", "loop", "gather-coalesced", "gather-each")
_BASELINES: dict[str, Callable[[Engine], Callable[[], None]]] = {
    "loop": Loop,
    "gather-coalesced": lambda engine: Gather(engine, each=False),
    "gather-each": lambda engine: Gather(engine, each=True),
}
# Relative Frobenius error of refactored float32 gradients. Rounding of S and of the product leaves at most 1e-6.
_TOLERANCE = 1e-5


def choose(engine: str, wanted: Sequence[str]) -> list[str]:
    """Return the variants to compare, plain LoRA first; all that the engine allows if none is named.

    Raises:
        ValueError: a variant is unknown, or impossible under this engine.
    """
    possible = [name for name in available(engine) if name != "riemannian" or _riemannian_optimizer() is not None]
    for name in wanted:
        if name == "riemannian" and name not in possible and name in available(engine):
            raise ValueError("--variants riemannian: this PEFT has no create_riemannian_optimizer; install peft>=0.21")
        if name not in possible:
            raise ValueError(f"--variants {name} is unknown or impossible here; --engine {engine} has {possible}")
    return [name for name in possible if name in (wanted or possible) or name == "lora"]


def available(engine: str) -> tuple[str, ...]:
    """Return the names of the variants under an engine. Loops need whole factors, and gathering needs cut ones.

    PEFT's optimizer needs two-dimensional whole weights. Elsewhere it does nothing, without an error.
    """
    return _WHOLE if engine in ("single", "ddp") else _SHARDED


@contextlib.contextmanager
def installed(name: str, trainee: Trainee) -> Iterator[Any]:
    """Make a variant act on every optimizer step inside. Yield the handle of ``attach``, or None.

    Raises:
        RuntimeError: the method did not act on every pair in every step, so its time would mean nothing.
    """
    name = name.removesuffix(FLAT)
    if name == "lora":
        yield None
    elif name == "riemannian":
        with _riemannian(trainee):
            yield None
    elif name in METHOD_OPTIMIZERS:
        with _own_optimizer(name, trainee) as handle:
            yield handle
    elif name in _BASELINES:
        engine = innermost_engine(trainee)
        baseline = torch.no_grad()(_BASELINES[name](engine))
        with before_update(engine, baseline):
            yield None
    else:
        handle = attach(trainee.model, trainee.optimizer, RefLoRAConfig(method=name, warmup_steps=0))
        with _applied_everywhere(handle):
            yield handle


@contextlib.contextmanager
def _applied_everywhere(handle: Handle) -> Iterator[None]:
    try:
        yield
        report = handle.report()
        if report.applied_steps != report.steps or report.skipped_pairs:
            raise RuntimeError(f"{report.method} did not act on every pair in every step: {report}")
    finally:
        handle.detach()


def innermost_engine(trainee: Trainee) -> Engine:
    """Return the engine that ``attach`` finds in a model and its optimizer."""
    return find_engine(trainee.model, trainee.optimizer, find_pairs(trainee.model))


@contextlib.contextmanager
def without_updates(trainee: Trainee) -> Iterator[None]:
    """Run optimizer steps with their hooks, but without moving the weights."""
    groups = innermost_engine(trainee).optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def check_same_result(
    engine: str, names: Sequence[str], trainee: Trainee, run_step: Callable[[], None]
) -> dict[str, float]:
    """Check that all variants of RefLoRA give the same gradients from the same weights and gradients.

    Args:
        engine: the engine. The reference is the loop for whole factors, otherwise gathering.
        names: the variants; those of other methods are ignored.
        trainee: the model and optimizer.
        run_step: runs one training step; every rank must call.

    Returns:
        By name the largest relative Frobenius error of a factor's refactored gradient.

    Raises:
        RuntimeError: an error is above 1e-5, or refactoring changes so little that the check proves nothing.
    """
    reference_name = "loop" if "loop" in available(engine) else "gather-coalesced"
    compared = [name for name in names if name in _SAME_RESULT and name != reference_name]
    with without_updates(trainee):
        reference = _gradients_after(reference_name, trainee, run_step)
        unchanged = _gradients_after("lora", trainee, run_step)
        group = innermost_engine(trainee).group
        if _largest_error(unchanged, reference, group) < 100 * _TOLERANCE:
            raise RuntimeError("refactoring hardly changes the gradients here: the variants cannot be told apart")
        errors = {}
        for name in compared:
            errors[name] = _largest_error(_gradients_after(name, trainee, run_step), reference, group)
            if not errors[name] < _TOLERANCE:
                raise RuntimeError(
                    f"{name} and {reference_name} disagree: a refactored gradient differs by {errors[name]:.1e} "
                    f"(relative), above {_TOLERANCE:.0e}; their times cannot be compared"
                )
    return errors


def _gradients_after(name: str, trainee: Trainee, run_step: Callable[[], None]) -> list[Tensor]:
    """Return this rank's pieces of all gradients as the update reads them, computed from fixed random ones."""
    engine = innermost_engine(trainee)
    seed = dist.get_rank() if engine.group is not None else 0  # replicas hold the same gradients
    seen: list[Tensor] = []

    def fill() -> None:
        gradients = [gradient for gradient in engine.gradients() if gradient is not None]
        generator = torch.Generator(gradients[0].device).manual_seed(seed)
        for gradient in gradients:
            gradient.normal_(generator=generator)

    def look() -> None:
        seen[:] = [gradient.clone() for gradient in engine.gradients() if gradient is not None]

    # hooks run in the order in which they were placed
    with before_update(engine, fill), installed(name, trainee), before_update(engine, look):
        run_step()
    return seen


def _largest_error(values: Sequence[Tensor], references: Sequence[Tensor], group: dist.ProcessGroup | None) -> float:
    squares = [
        torch.stack([(value.double() - reference.double()).square().sum(), reference.double().square().sum()])
        for value, reference in zip(values, references, strict=True)
    ]
    summed = torch.stack(squares)
    if group is not None:
        dist.all_reduce(summed, group=group)
    return float((summed[:, 0] / summed[:, 1]).sqrt().max())


@contextlib.contextmanager
def before_update(engine: Engine, action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` before every update inside."""
    handle = engine.optimizer.register_step_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        handle.remove()


def _riemannian_optimizer() -> Callable[..., torch.optim.Optimizer] | None:
    try:
        from peft.optimizers import create_riemannian_optimizer
    except ImportError:
        return None
    return create_riemannian_optimizer


@contextlib.contextmanager
def _own_optimizer(name: str, trainee: Trainee) -> Iterator[Handle]:
    """Replace the steps of the trainee's optimizer, which an engine may hold, by a method's on the same parameters."""
    outer, inner = trainee.optimizer, innermost_engine(trainee).optimizer
    # random gradients may be large, and no update may be skipped
    own = METHOD_OPTIMIZERS[name]([torch.zeros(1)], **({"update_skipping": 0.0} if name == "lora-rite" else {}))
    own.param_groups = inner.param_groups
    for group in own.param_groups:
        for key, value in own.defaults.items():
            group.setdefault(key, value)
    if outer is inner:
        outer.step = own.step  # hides the method of the class
    else:
        outer.optimizer = own
    try:
        handle = attach(trainee.model, own if outer is inner else outer, RefLoRAConfig(method=name))
        with _applied_everywhere(handle):
            yield handle
    finally:
        if outer is inner:
            del outer.step
        else:
            outer.optimizer = inner


@contextlib.contextmanager
def _riemannian(trainee: Trainee) -> Iterator[None]:
    """Replace the steps of the trainee's optimizer by those of PEFT's, on the same state."""
    create = _riemannian_optimizer()
    assert create is not None
    optimizer = trainee.optimizer
    preconditioned = create(trainee.model, torch.optim.AdamW, lr=optimizer.param_groups[0]["lr"], fused=True)
    preconditioned.state, preconditioned.param_groups = optimizer.state, optimizer.param_groups
    optimizer.step = preconditioned.step  # hides the method of the class
    try:
        yield
    finally:
        del optimizer.step
