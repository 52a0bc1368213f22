"""Training the reference's cases on an engine, on the ranks of this process group, and how far that ended from them."""

from __future__ import annotations

import dataclasses
from typing import Any

from reflora_dist import Handle, RefLoRACallback, RefLoRAConfig, attach, tall_adapters
from tests.support.engines_under_test import ENGINES
from tests.support.oracles import trained_in_float64
from tests.support.recorder import CollectiveRecorder, check_collectives
from tests.support.workloads import (
    Reference,
    as_products,
    build_model,
    load_reference,
    train_single,
    with_method,
    worst_factor_error,
    worst_loss_error,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a launch: a case of the reference, perhaps split up or handed over differently.

    With a ``method`` the case only says how to train, and the method's oracle where to end.
    """

    case: str
    method: str = ""
    carry_moments: bool = False
    accumulate: bool = False
    bare: bool = False
    clip: float = 0.0
    tall: bool = False

    @property
    def label(self) -> str:
        suffixes = {
            "with moments": self.carry_moments,
            "accumulated": self.accumulate,
            "bare model": self.bare,
            "clipped": self.clip,
            "tall": self.tall,
        }
        return " ".join([self.method or self.case, *(suffix for suffix, present in suffixes.items() if present)])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far one run ended from its reference on this rank, and from what it must not agree with.

    That is the reference of plain LoRA for a run with a ``method``, that of the case for ``reflora`` with moments, and
    that of ``reflora`` for all others.
    """

    label: str
    factor_error: float
    loss_error: float
    distance_to_other: float


class _Attached:
    """Attaches a case's method and records its collectives; an attach function and, for Trainer, a callback."""

    def __init__(self, case: dict[str, Any], tall: bool, carry_moments: bool) -> None:
        self.tall = tall
        schedule = {"warmup_steps": case.get("warmup", 0), "interval": case.get("interval", 1)}
        self.config = RefLoRAConfig(method=case["method"], carry_moments=carry_moments, **schedule)
        self.recorder: CollectiveRecorder | None = None
        self.handle: Handle | None = None

    def __call__(self, model: Any, optimizer: Any) -> Handle:
        self.handle = attach(model, optimizer, self.config)
        self.recorder = CollectiveRecorder(self.handle)
        return self.handle

    def callback(self) -> RefLoRACallback:
        attached = self

        class Recorded(RefLoRACallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                super().on_train_begin(*args, **kwargs)
                attached.handle = self.handle
                attached.recorder = CollectiveRecorder(self.handle)

        return Recorded(self.config, tall=self.tall)

    def check_collectives(self, steps: int) -> None:
        assert self.recorder is not None and self.handle is not None
        assert len(self.recorder.steps) == self.handle.report().steps == steps
        check_collectives(self.handle, self.recorder.steps)


def train_all(rank: int, world_size: int, engine_name: str, runs: list[Run]) -> list[Outcome]:
    """Body of a rank: train every run and compare on each rank, so that replicas that drift apart show."""
    reference = load_reference()
    return [_train_one(reference, engine_name, world_size, run) for run in runs]


def _train_one(reference: Reference, engine_name: str, world_size: int, run: Run) -> Outcome:
    engine, case = ENGINES[engine_name], dict(reference.cases[run.case])
    settings = reference.settings_of(run.case)
    settings = dataclasses.replace(
        settings,
        clip=run.clip or settings.clip,
        grad_accum=_micro_batches(reference, world_size) if run.accumulate else 1,
    )
    if run.method:
        case["method"] = run.method
        settings = with_method(settings, run.method)
    expected_losses, expected_factors = case["losses"], reference.factors[run.case]
    attached = _Attached(case, run.tall, run.carry_moments)
    model = build_model(reference, dtype=engine.model_dtype)
    if run.tall and not engine.takes_callback:
        assert tall_adapters(model) == len(expected_factors) // 2
    losses, factors = engine.train(
        model,
        reference.batches,
        settings,
        attached.callback() if engine.takes_callback else attached,
        hand_over_bare=run.bare,
    )
    attached.check_collectives(len(reference.batches))
    if run.method:
        expected_losses, expected_factors = trained_in_float64(reference, settings, attached.config)
    elif run.clip:  # the reference has no such case
        expected_losses, expected_factors = train_single(build_model(reference), reference.batches, settings)
    other = "lora" if run.method else "reflora"
    if run.method == "reflora":  # the published one, which leaves the moments
        other = run.case
    other_factors = reference.factors[other]
    if run.method == "balora" and engine.bf16_factor_tolerance:
        # gradients of 16 bits turn singular vectors of close singular values, which products do not depend on
        factors, expected_factors, other_factors = map(as_products, (factors, expected_factors, other_factors))
    return Outcome(
        run.label,
        worst_factor_error(factors, expected_factors),
        worst_loss_error(losses, expected_losses),
        worst_factor_error(factors, other_factors),
    )


def _micro_batches(reference: Reference, world_size: int) -> int:
    """Four micro-batches where they split every rank's slice evenly, else three or two."""
    local_batch = reference.batches.shape[1] // world_size
    return next(number for number in (4, 3, 2) if local_batch % number == 0)
