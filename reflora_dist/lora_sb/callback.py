"""The callback that runs LoRA-SB and LoRA-XS in HF Trainer."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.adapter_files import load_adapter, load_frozen, save_adapter
from ..checkpoints.trainer_folders import checkpoint_folder, resumed_checkpoint
from ..checkpoints.training_state import load_checkpoint, save_into
from ..engines.find_training import find_training_engine
from ..step.report import Report
from .config import LoRASBConfig
from .gradients import Loss
from .initialize import initialize_lora_sb, initialize_lora_xs
from .layer import LoraXSLinear

logger = logging.getLogger(__name__)


class LoRASBCallback(TrainerCallback):
    """Initializes the adapters when training begins, from the Trainer's own batches, under every engine.

    A and B cannot be recomputed later, so this callback writes the adapter into every checkpoint, under every engine.
    A resumed run loads A and B from there instead of initializing them.

    Args:
        config: the settings, as a :class:`LoRASBConfig` or a dictionary of its fields.
        loss: ``loss(model, batch)`` for "lora-sb"; needed if the Trainer's loss is not the model's own.
    """

    def __init__(self, config: LoRASBConfig | Mapping[str, Any], *, loss: Loss | None = None) -> None:
        self._loss = loss
        self.config = config if isinstance(config, LoRASBConfig) else LoRASBConfig(**config)
        self._report: Report | None = None
        self._initialized: weakref.WeakSet[LoraXSLinear] = weakref.WeakSet()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._report = _describe(model, optimizer, self.config.method, state.global_step)
        if state.global_step:
            folder = resumed_checkpoint(args, state)
            if isinstance(model, FullyShardedDataParallel):
                load_checkpoint(folder, model, optimizer)
            else:
                load_frozen(model, folder)
        elif self._initialized and self._initialized >= {*_layers(model)}:
            logger.warning("the adapters were initialized for an earlier train(): training goes on from what they are")
        elif self.config.method == "lora-xs":
            initialize_lora_xs(model, optimizer, self.config)
        else:
            config = dataclasses.replace(self.config, learning_rate=self.first_learning_rate(args, state))
            batches = _first_batches(kwargs["train_dataloader"], config.num_batches)
            initialize_lora_sb(model, optimizer, batches, config, loss=self._loss)
        self._initialized.update(_layers(model))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._report is not None
        steps = self._report.steps + 1
        self._report = dataclasses.replace(self._report, steps=steps, applied_steps=steps)

    def report(self) -> Report:
        """Return a report as ``Handle.report()`` does; its collectives and bytes are zero, as a step sends nothing.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._report is None:
            raise RuntimeError("report() before training: the adapters are initialized in on_train_begin")
        return self._report

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = checkpoint_folder(args, state)
        if isinstance(kwargs["model"], FullyShardedDataParallel):
            save_into(folder, kwargs["model"], kwargs["optimizer"])
        else:
            save_adapter(kwargs["model"], folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and isinstance(kwargs["model"], FullyShardedDataParallel):
            # Trainer has just loaded the best checkpoint, from files that hold no adapter
            load_adapter(kwargs["model"], kwargs["optimizer"], best)

    def first_learning_rate(self, args: TrainingArguments, state: TrainerState) -> float:
        """Return the configured learning rate, or that of the first step of a linear warm-up.

        As published, the warm-up is assumed to be linear for every schedule.
        """
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return args.learning_rate / max(1, args.get_warmup_steps(state.max_steps))


def _describe(model: Any, optimizer: Any, method: str, steps: int) -> Report:
    engine = find_training_engine(model, optimizer)
    ranks = Counter(
        layer.r[adapter] for layer in _layers(model) for adapter in layer.active_adapters if adapter in layer.r
    )
    return Report(
        method=method,
        engine=engine.name,
        layout=engine.layout,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        num_pairs=sum(ranks.values()),
        lora_ranks=dict(ranks),
        collectives_per_step={},
        bytes_per_step=0,
        steps=steps,
        applied_steps=steps,
        skipped_pairs=0,
    )


def _layers(model: Any) -> list[LoraXSLinear]:
    return [module for module in model.modules() if isinstance(module, LoraXSLinear)]


def _first_batches(loader: Any, count: int) -> list[Any]:
    """Return the first batches of training, and restore the loader so that training still begins with them."""
    generators = {id(found): found for found in _generators(loader)}
    states = {key: generator.get_state() for key, generator in generators.items()}
    with torch.random.fork_rng(devices=[]):
        iterator = iter(loader)
        batches = list(itertools.islice(iterator, count))
        if hasattr(iterator, "close"):
            iterator.close()
    if hasattr(loader, "end"):
        loader.end()  # without it accelerate treats a loader that was left early as still active
    for key, generator in generators.items():
        generator.set_state(states[key])
    return batches


def _generators(loader: Any) -> list[torch.Generator]:
    """Return every random generator that a loader or its samplers draw from."""
    found, waiting = [], [loader]
    while waiting:
        part = waiting.pop()
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            found.append(generator)
        children = (getattr(part, name, None) for name in ("base_dataloader", "sampler", "batch_sampler"))
        waiting += [child for child in children if child is not None]
    return found
