"""Runs of the convergence benchmark: one fine-tuning run, the timing of steps, the sweep."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import logging
import math
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
from transformers import logging as transformers_logging

from benchmarks.harness import timing
from benchmarks.harness.names import MOMENTS
from benchmarks.sweep.data import Batch, Material
from benchmarks.sweep.same_start import plain_steps
from benchmarks.sweep.tasks import Schedule, Task
from launchers.data.tokenization import IGNORE_INDEX
from reflora_dist import Handle, RefLoRAConfig, attach
from reflora_dist.lora_sb import LoRASBConfig, LoraXSConfig, initialize_lora_sb, initialize_lora_xs
from reflora_dist.methods.names import LATENT_METHODS
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS

TIMED_STEPS, UNTIMED_STEPS = 5, 3
_GRADIENT_BATCHES = 8  # the first batches of training, from which LoRA-SB takes its first step


class Workbench:
    """A model on a device and its text. Runs follow each other, each from newly drawn factors."""

    def __init__(self, material: Material, schedule: Schedule, device: torch.device) -> None:
        _be_quiet()
        self.schedule, self.device = schedule, device
        lora = LoraConfig(r=schedule.lora_rank, target_modules="all-linear")  # reset sets alpha
        self.model = get_peft_model(self._base(material.model), lora)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self._base_weights = (
            [_base_weight(layer).clone() for layer in self._layers] if schedule.start == "drawn" else []
        )
        self._material = material
        self._choosing = material.evaluation_batches(material.choosing, device)
        self._held_out = material.evaluation_batches(material.held_out, device)
        self._latent_model: PeftModel | None = None
        self._batches: tuple[int, list[Batch]] | None = None

    def _base(self, model: str) -> Any:
        dtype = torch.bfloat16 if self.schedule.bf16 else torch.float32
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(self.device)
        base.config.use_cache = False
        return base

    def latent_model(self) -> PeftModel:
        """Return the model with adapters of LoRA-XS, made at the first call."""
        if self._latent_model is None:
            config = LoraXSConfig(r=self.schedule.latent_rank, target_modules="all-linear")
            self._latent_model = get_peft_model(self._base(self._material.model), config)  # type: ignore[arg-type]
        return self._latent_model

    def batches(self, seed: int) -> list[Batch]:
        """Return the training batches of a seed. Those of the last seed are kept."""
        if self._batches is None or self._batches[0] != seed:
            schedule = self.schedule
            made = self._material.batches(seed, schedule.steps, schedule.batch_size, self.device)
            self._batches = (seed, made)
        return self._batches[1]

    def reset(self, task: Task) -> torch.optim.Optimizer:
        """Draw the factors anew and return a new optimizer over them."""
        torch.manual_seed(task.seed)
        for layer in self._layers:
            layer.reset_lora_parameters("default", True)
            layer.scaling["default"] = task.alpha
        for layer, weight in zip(self._layers, self._base_weights, strict=False):  # empty unless the start is drawn
            lora_a, lora_b = (factors["default"].weight.detach() for factors in (layer.lora_A, layer.lora_B))
            torch.nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
            _base_weight(layer).copy_(weight - layer.get_delta_weight("default").detach())
            lora_a.mul_(task.start_scale)
            lora_b.div_(task.start_scale)
        if task.method in METHOD_OPTIMIZERS:
            return METHOD_OPTIMIZERS[task.method](self.trained, lr=task.learning_rate)
        if self.schedule.optimizer == "sgd":
            return torch.optim.SGD(self.trained, lr=task.learning_rate, momentum=0.9)
        return torch.optim.AdamW(self.trained, lr=task.learning_rate, weight_decay=0.0, fused=True)

    def run(self, task: Task) -> dict[str, Any]:
        """Fine-tune once.

        Args:
            task: method, learning rate, seed, alpha, and the scale of the start.

        Returns:
            The task; ``start_digest``: digest of the factors and the training batches; ``train_losses`` by step;
            ``held_out_steps`` and ``held_out_losses``: loss per answer token of the records that are reported, None if
            not finite; ``choosing_loss``: that of the records that choose the learning rate, at the end;
            ``skipped_pairs`` and ``applied_steps`` of the handle's report; ``wall_seconds``.
        """
        schedule, batches = self.schedule, self.batches(task.seed)
        began = timing.now(self.device)
        model, optimizer, handle = self._start(task, batches)
        decay = get_cosine_schedule_with_warmup(optimizer, schedule.lr_warmup_steps, schedule.steps)
        start_digest = self._digest(batches)
        train_losses, held_out = [], [(0, self.evaluate(model, self._held_out))]
        for step, batch in enumerate(batches, start=1):
            train_losses.append(self._backward(model, batch))
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            if step % schedule.eval_every == 0 or step == schedule.steps:
                held_out.append((step, self.evaluate(model, self._held_out)))
        choosing = self.evaluate(model, self._choosing)
        report = {"applied_steps": len(train_losses), "skipped_pairs": 0}
        if handle is not None:
            report = handle.report().as_dict()
            handle.detach()
        return {
            **dataclasses.asdict(task),
            "start_digest": start_digest,
            "train_losses": [_finite(loss) for loss in torch.stack(train_losses).tolist()],
            "held_out_steps": [step for step, _ in held_out],
            "held_out_losses": [_finite(loss) for _, loss in held_out],
            "choosing_loss": _finite(choosing),
            "applied_steps": report["applied_steps"],
            "skipped_pairs": report["skipped_pairs"],
            "wall_seconds": timing.now(self.device) - began,
        }

    def _start(
        self, task: Task, batches: Sequence[Batch], warmup_steps: int | None = None
    ) -> tuple[PeftModel, torch.optim.Optimizer, Handle | None]:
        """Return the model, its optimizer, and the handle of the method, or None for LoRA-SB and LoRA-XS."""
        schedule = self.schedule
        optimizer = self.reset(task)
        if task.method not in LATENT_METHODS:
            plain = schedule.warmup_steps if warmup_steps is None else warmup_steps
            return self.model, optimizer, attach(self.model, optimizer, _config(task.method, plain))
        model = self.latent_model()
        optimizer = torch.optim.AdamW(
            (parameter for parameter in model.parameters() if parameter.requires_grad),
            lr=task.learning_rate,
            weight_decay=0.0,
            fused=True,
        )
        first = task.learning_rate / max(1, schedule.lr_warmup_steps)
        count = min(_GRADIENT_BATCHES, len(batches))
        config = LoRASBConfig(method=task.method, num_batches=count, learning_rate=first, seed=task.seed)
        if task.method == "lora-sb":
            model.train()
            initialize_lora_sb(model, optimizer, batches, config)
        else:
            initialize_lora_xs(model, optimizer, config)
        return model, optimizer, None

    def _backward(self, model: PeftModel, batch: Batch) -> Tensor:
        model.train()
        with self._precision():
            loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.bf16)

    @torch.no_grad()
    def evaluate(self, model: PeftModel, batches: Sequence[Batch]) -> float:
        """Return the loss per answer token."""
        model.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in batches:
            # a batch's loss is the mean over predicted labels, and no row's first position is predicted
            count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            with self._precision():
                total += model(**batch).loss.double() * count
            tokens += count
        return float(total) / tokens

    def _digest(self, batches: Sequence[Batch]) -> str:
        digest = hashlib.sha256()
        for tensor in (*self.trained, *(batch["input_ids"] for batch in batches)):
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def time_steps(self, methods: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
        """Return milliseconds of a training step by method (median, quartiles), from interleaved blocks."""
        times: dict[str, list[float]] = {method: [] for method in methods}
        batches = self.batches(0)
        for round_ in range(rounds):
            for turn in range(len(methods)):
                # each round begins with another method
                method = methods[(round_ + turn) % len(methods)]
                times[method] += self._time_block(method, batches[round_ % len(batches)])
        return {method: timing.spread(values) for method, values in times.items()}

    def _time_block(self, method: str, batch: Batch) -> list[float]:
        batches = [batch] * _GRADIENT_BATCHES
        model, optimizer, handle = self._start(Task(method, 1e-4, 0), batches, warmup_steps=1)  # leaves B = 0 behind
        times = []
        for step in range(UNTIMED_STEPS + TIMED_STEPS):
            began = timing.now(self.device)
            self._backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            if step >= UNTIMED_STEPS:
                times.append(1e3 * (timing.now(self.device) - began))
        if handle is not None:
            handle.detach()
        return times


def _config(method: str, warmup_steps: int) -> RefLoRAConfig:
    carries = method.endswith(MOMENTS)
    plain = plain_steps(method, warmup_steps)
    return RefLoRAConfig(method=method.removesuffix(MOMENTS), warmup_steps=plain, carry_moments=carries)


def _base_weight(layer: LoraLayer) -> Tensor:
    return layer.get_base_layer().weight.detach()


def _be_quiet() -> None:
    """Switch off progress bars and warnings, which every worker would show as it loads the model."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # it warns of missing kernels for 4-bit bases; there is none here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _finite(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def sweep(tasks: Sequence[Task], bench: Workbench, material: Material, workers: int) -> Iterator[dict[str, Any]]:
    """Run the tasks and yield their results as they come, in this process or in several workers."""
    if workers == 1 or not tasks:
        yield from map(bench.run, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(material, bench.schedule, bench.device),
    )
    with pool:
        futures = [pool.submit(_run_in_worker, task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # show the error before the sweep has finished
            raise


_worker_bench: list[Workbench] = []


def _start_worker(material: Material, schedule: Schedule, device: torch.device) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the workers share the cores
    _worker_bench.append(Workbench(material, schedule, device))


def _end_with_parent() -> None:
    """End this worker with its parent. Workers of a pool would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(task: Task) -> dict[str, Any]:
    return _worker_bench[0].run(task)
