"""attach() and its handle: they find the engine, make the method's step and register the optimizer's hooks."""

from __future__ import annotations

import functools
import json
import logging
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..collectives.communicator import Communicator
from ..collectives.ranks import raise_on_all_ranks
from ..engines.base import Engine
from ..engines.find import find_engine
from ..engines.pairs import active_adapters, by_expert, find_pairs, lora_layers
from ..methods.config import RefLoRAConfig
from ..methods.registry import METHODS
from .handle_state import changed_settings, check_state, handle_state
from .kinds import make_step
from .ranks_agree import compare_ranks, differ_between_replicas
from .report import Report
from .supported_optimizers import check_optimizer, pairs_without_solution

logger = logging.getLogger(__name__)

_attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def attach(
    model: nn.Module, optimizer: Any, config: RefLoRAConfig, *, state_dict: Mapping[str, Any] | None = None
) -> Handle:
    """Make an optimizer apply a method to the model's LoRA adapters. Call it on every rank, after wrapping.

    The method changes gradients in place, so clear them after every step, as any training loop does. A step that
    GradScaler skips because of an overflow is not counted, unless a fused optimizer hides the overflow from its hooks.
    A compiled optimizer step runs with the hooks outside its graph, so ``fullgraph=True`` does not work.

    Args:
        model: the PEFT model, bare or as DDP, fully_shard, FSDP, deepspeed.initialize or accelerator.prepare
            returned it.
        optimizer: the optimizer, bare or as one of these returned it: any elementwise torch optimizer; for "reflora-s",
            and "balora" with ``carry_moments``, one of the Adam family, for "lora-rite" a LoRARite, for "lora-muon" a
            LoRAMuon.
        config: the method and its schedule, the same on all ranks.
        state_dict: a handle's saved state, to continue a run. Load its factors and optimizer state before.

    Returns:
        A handle for reports, checkpoints and detaching.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank and before anything changes. The model has no adapter, a
            pair, the optimizer or an option of the engine is not supported, the optimizer does not hold the factors,
            ``state_dict`` does not fit, or ranks disagree.

    Communication: one all-gather of a few numbers; for "lora-rite" and "lora-muon", and with ``state_dict``, each one
    more of small objects; for "reflora-s" and "balora" with ``warmup_steps=0`` those of a step. At the first step, if
    ranks hold the factors whole, one all-reduce of two numbers.
    """
    engine, error = None, None
    try:
        engine = _find(model, optimizer, config)
        if state_dict is not None:
            check_state(state_dict, config, engine.pairs)
    except Exception as caught:  # any error, since the other ranks must raise it too
        engine, error = None, caught
    state = "" if state_dict is None else json.dumps(dict(state_dict), sort_keys=True, default=str)
    resumed = compare_ranks(engine, config, state, error)
    assert engine is not None
    hopeless = pairs_without_solution(engine.pairs, config)
    if hopeless:
        _warn(
            f"r is above in or out of {len(hopeless)} of {len(engine.pairs)} adapters "
            f"({engine.pairs[hopeless[0]].name}, ...), where "
            f"{config.method} has no solution: these train as plain LoRA; to change that, lower their r (rank_pattern)"
        )
    _tell_what_flat_adapters_cost(engine, config)
    if state_dict is not None:
        _refuse_broken_factors(engine)
    handle = Handle(model, config, engine, hopeless)
    if state_dict is not None:
        handle.load_state_dict(state_dict)
    elif not resumed:
        handle._start()
    return handle


class Handle:
    """The link between a model's adapters and their optimizer. Made by :func:`attach`.

    Attributes:
        config: the method and its schedule.
    """

    def __init__(self, model: nn.Module, config: RefLoRAConfig, engine: Engine, hopeless: Sequence[int]) -> None:
        self.config = config
        self._engine = engine
        self._layers = lora_layers(model)
        self._active_adapters = active_adapters(self._layers)
        weights = engine.weights()
        self._comm = Communicator(engine.group, weights[0].device)
        self._steps = 0
        self._applied_steps = 0
        self._skipped_pairs = torch.zeros((), dtype=torch.int64, device=self._comm.device)
        self._checked = False
        self._is_no_step = False
        self._begins = False
        self._sent_bytes = 0
        self._step = make_step(engine, config, self._comm, hopeless)
        # torch.compile would trace into the hooks, and cannot see that kernels change gradients by their addresses
        untraced = functools.partial(torch.compiler.disable, reason="reflora_dist's hooks cannot be part of a graph")
        self._hooks = [
            engine.optimizer.register_step_pre_hook(untraced(self._before_update)),
            engine.optimizer.register_step_post_hook(untraced(self._after_update)),
        ]
        _attached.add(engine.optimizer)

    def report(self) -> Report:
        """Return this rank's figures so far. Waits for the device; local, no communication."""
        lora_ranks: dict[int, int] = {}
        pairs = by_expert(self._engine.pairs)
        for pair in pairs:
            lora_ranks[pair.lora_rank] = lora_ranks.get(pair.lora_rank, 0) + 1
        return Report(
            method=self.config.method,
            engine=self._engine.name,
            layout=self._engine.layout,
            world_size=dist.get_world_size() if dist.is_initialized() else 1,
            num_pairs=len(pairs),
            lora_ranks=lora_ranks,
            collectives_per_step=dict(self._comm.calls),
            bytes_per_step=self._comm.bytes,
            steps=self._steps,
            applied_steps=self._applied_steps,
            skipped_pairs=int(self._skipped_pairs),
        )

    def figures(self) -> dict[str, float]:
        """Return figures of the last step in which the method acted, for logs.

        Waits for the device; local, no communication.

        Returns:
            A dictionary of finite numbers, empty until the method has acted and for method="lora":

            - ``step_ms``: milliseconds that the method took on this rank, without work on a side stream; for
              "lora-rite" and "lora-muon" the whole update.
            - ``bytes_per_step``: bytes that this rank sent.
            - ``skipped_pairs``: as in the report; ``skipped_share``: their share of all pairs in all steps so far.
            - ``balance_min``, ``balance_median``, ``balance_max``: ``|A| / |B|`` over the pairs, before the step;
              ``balance_after_median`` after it, if the method rewrites the factors.
            - ``gradient_change``: norm of the change that the method made to the gradients by the norm of these, for a
              method that changes them, in the last step that :meth:`watch_next_step` announced. It counts the rows of
              this rank, or, for "lora-pro", all rows.
            - ``gram_condition_median``, ``gram_condition_max``: condition numbers of the Gram matrices, if the method
              forms any.
        """
        figures = self._step.figures()
        if not figures:
            return {}
        skipped = int(self._skipped_pairs)
        pairs = self._applied_steps * len(by_expert(self._engine.pairs))
        return figures | {
            "skipped_pairs": skipped,
            "skipped_share": skipped / pairs if pairs else 0.0,
            "bytes_per_step": self._sent_bytes,
            "step_ms": self._step.stopwatch.milliseconds(),
        }

    def watch_next_step(self) -> None:
        """Have the coming step measure ``gradient_change`` for :meth:`figures`. It sends no more, and does not wait."""
        self._step.watched = True

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps, JSON-ready and the same on all ranks. Waits for the device."""
        skipped_pairs = int(self._skipped_pairs)
        return handle_state(self.config, self._steps, self._applied_steps, skipped_pairs, self._engine.pairs)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the schedule of a saved run. The engine loads the factors and the optimizer's state, not this.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: the state was written by another version, for another method or other adapters.
        """
        check_state(state_dict, self.config, self._engine.pairs)
        if changed := changed_settings(state_dict, self.config):
            _warn(f"the run goes on with other settings than it was saved with: {changed}")
        self._steps = int(state_dict["steps"])
        self._applied_steps = int(state_dict["applied_steps"])
        self._skipped_pairs.fill_(int(state_dict["skipped_pairs"]))

    def detach(self) -> None:
        """Remove the hooks from the optimizer. Call it on every rank.

        Training may continue as plain LoRA, except with LoRARite and LoRAMuon, whose ``step`` raises once detached.
        """
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            _attached.discard(self._engine.optimizer)
            self._step.close()
        self._hooks = []

    @torch.no_grad()
    def _before_update(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        # torch passes the optimizer itself as the first argument
        if any(argument is not None for argument in args[1:]) or kwargs.get("closure") is not None:
            raise RuntimeError(
                "optimizer.step(closure) computes gradients after they would be refactored: call backward() first, "
                "then step() without a closure"
            )
        self._is_no_step = not optimizer.state and _fills_state()
        if self._is_no_step:
            return
        if not self._checked:
            self._engine.check()
            self._refuse_gradients_that_nobody_reduces()
            self._checked = True
        if active_adapters(self._layers) != self._active_adapters:
            raise RuntimeError("the active adapters changed after attach(): detach, then attach again")
        firing = self._engine.firing()
        due = self.config.is_due(self._steps)
        if firing.first:
            self._comm.start_step()
            # not the step after the warm-up: a run that was resumed with a shorter one is past it already
            self._begins = due and self._applied_steps == 0
        self._count(self._step.before_update(firing, due=due, begins=self._begins))

    @torch.no_grad()
    def _after_update(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._is_no_step:
            return
        firing = self._engine.firing()
        self._engine.end_firing()
        self._steps += firing.last
        self._count(self._step.after_update(firing, due=firing.last and self.config.is_due(self._steps)))
        if firing.last:
            self._sent_bytes = self._comm.bytes or self._sent_bytes

    def _count(self, skipped: torch.Tensor | None) -> None:
        if skipped is not None:
            self._skipped_pairs += skipped
            self._applied_steps += 1

    def _refuse_gradients_that_nobody_reduces(self) -> None:
        """Refuse gradients that differ between ranks that hold the factors whole. Every rank must call."""
        engine = self._engine
        if engine.group is None and differ_between_replicas(engine, engine.gradients()):
            raise RuntimeError(
                "the gradients of the factors differ between ranks: nobody reduces them, and every rank would train an "
                "adapter of its own. Wrap the model (DistributedDataParallel, fully_shard, FSDP, deepspeed.initialize, "
                "accelerator.prepare); under fully_shard make the adapter first (get_peft_model), then shard"
            )

    @torch.no_grad()
    def _start(self) -> None:
        skipped = self._step.before_first_step(due=self.config.is_due(0))
        if skipped is not None:
            self._skipped_pairs += skipped


def _find(model: nn.Module, optimizer: Any, config: RefLoRAConfig) -> Engine:
    if not isinstance(config, RefLoRAConfig):
        raise TypeError(f"config is a {type(config).__name__}; pass RefLoRAConfig(method=..., warmup_steps=...)")
    engine = find_engine(model, optimizer, find_pairs(model))
    check_optimizer(engine.optimizer, config, engine.pairs)
    if engine.optimizer in _attached:
        raise RuntimeError("this optimizer is attached already: call detach() on its handle first")
    return engine


def _refuse_broken_factors(engine: Engine) -> None:
    """Refuse loaded factors that are not finite. Every rank must call; one all-gather of small objects."""
    with raise_on_all_ranks("reading the factors"):
        names = engine._factor_names()
        broken = [n for n, w in zip(names, engine.weights(), strict=True) if not bool(torch.isfinite(w).all())]
        if broken:
            raise ValueError(f"{broken[0]} is not finite in what was loaded: continue from an earlier checkpoint")


def _tell_what_flat_adapters_cost(engine: Engine, config: RefLoRAConfig) -> None:
    """Warn before training of the traffic that flat lora_A cause in every step."""
    flat = [layout for layout in engine.layouts() if layout.moves and layout.columns]
    if METHODS[config.method].channels_there and flat:
        megabytes = sum(METHODS[config.method].channels(config)) * 4e-6 * sum(layout.numel for layout in flat)
        _warn(
            f"{len(flat)} of {len(engine.pairs)} lora_A are stored as [r, in] and cut by {engine.name}: in every step "
            f"{megabytes:.1f} MB move for them, in messages from every rank to every other. Call "
            "reflora_dist.tall_adapters(model) after get_peft_model and before wrapping and the optimizer: then only "
            "Grams are sent (RefLoRACallback does so by itself if it is given to Trainer(callbacks=[...]))"
        )


def _fills_state() -> bool:
    """Return whether torch.distributed.checkpoint is filling an empty optimizer state by a step of size zero.

    The call stack tells: the first step of a learning-rate warm-up has size zero as well. Ranks cannot be asked, since
    torch takes this step on some ranks only.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _warn(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(text)
