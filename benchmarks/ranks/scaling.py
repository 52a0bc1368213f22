"""One rank of ``benchmarks/scaling.py``: check and time training, bare collectives, products and held-out steps.

That script starts it under torchrun, with the paths of a job and of the result, both JSON.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import cost_model
from benchmarks.costs import events as cost_events
from benchmarks.costs.scaling_events import EVICTED_BYTES, collectives, packings, since
from benchmarks.harness import engines, models, timing
from reflora_dist import RefLoRAConfig, attach
from reflora_dist.engines.pairs import find_pairs
from reflora_dist.methods.reference import ReferenceRefLoRA

CONFIG = RefLoRAConfig(method="reflora", warmup_steps=0)
CHECK_STEPS = 4
CHECK_LEARNING_RATE = 5e-3  # large enough that LoRA and RefLoRA differ after a few steps
TIMED_LEARNING_RATE = 1e-4
CHECK_TOLERANCE = 2e-5  # relative; engines sum float32 losses in other orders
# (hidden size, layers, r) of the steps for the fit, and of those that only check it
WHOLE_SIZES = ((128, 1, 4), (256, 4, 4), (256, 2, 64), (512, 2, 16), (1024, 2, 4), (1024, 1, 64))
FITTED_SIZES = ((256, 4, 4), (256, 2, 64), (640, 2, 16))
HELD_OUT_SIZES = ((512, 8, 16), (384, 4, 8), (768, 4, 32))
SHARDED_ENGINES = ("fsdp2", "zero3", "fsdp2-flat", "zero3-flat")
WARM_UP_ROUNDS = 2

Batch = torch.Tensor


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device = engines.start()
    result: dict[str, Any] = {"ranks": dist.get_world_size(), "training": [], "fitted": [], "held_out": []}
    if job["training"]:
        result["training"] = training_cells(job, device)
    if job["fit"]:
        rounds = job["fit_rounds"]
        sharded = [engine for engine in job["engines"] if engine in SHARDED_ENGINES]
        fitted = itertools.product(sharded, FITTED_SIZES if job["fit_steps"] else ())
        held_out = itertools.product(sharded, HELD_OUT_SIZES)
        result["fitted"] = measure_events(rounds, device)
        result["fitted"] += [sharded_step(*point, rounds, device) for point in fitted]
        result["held_out"] = [sharded_step(*point, rounds, device) for point in held_out]
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    engines.finish()


def training_cells(job: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Measure weak and strong scaling of every engine on these ranks, after checking that engines train alike."""
    ranks = dist.get_world_size()
    shape = models.SHAPES[job["shape"]]
    model_of = functools.partial(models.build_model, shape, job["lora_rank"], device, seed=job["seed"])
    batches = _global_batches(job, shape.vocab_size, device)
    expected = _reference_losses(model_of, batches) if dist.get_rank() == 0 else None
    (expected,) = _broadcast(expected)
    cells = []
    for engine in job["engines"]:
        trainee = engines.wrap(
            engine, model_of(), micro_batch_size=job["batch_size"], learning_rate=CHECK_LEARNING_RATE
        )
        check_losses(engine, ranks, _losses(trainee, batches), expected)
        for group in trainee.optimizer.param_groups:
            group["lr"] = TIMED_LEARNING_RATE
        strong_batch = job["global_batch_size"] // ranks
        timed: dict[int, dict[str, Any]] = {}
        for scaling, batch_size in (("weak", job["batch_size"]), ("strong", strong_batch)):
            if batch_size not in timed:
                timed[batch_size] = _time_training(trainee, batch_size, job, shape.vocab_size, device)
            cells.append({"scaling": scaling, "engine": engine, "ranks": ranks, **timed[batch_size]})
        del trainee
    return cells


def _global_batches(job: dict[str, Any], vocab_size: int, device: torch.device) -> list[Batch]:
    """Return one batch several times, so that its loss falls, and differently under LoRA and RefLoRA."""
    generator = torch.Generator().manual_seed(job["seed"])
    size = (job["global_batch_size"], job["seq_len"])
    return CHECK_STEPS * [torch.randint(vocab_size, size, generator=generator).to(device)]


def _reference_losses(model_of: Callable[[], torch.nn.Module], batches: list[Batch]) -> dict[str, list[float]]:
    """Return the losses of LoRA and of the plain single-process RefLoRA on whole batches."""
    losses: dict[str, list[float]] = {}
    for method in ("lora", "reflora"):
        model = model_of()
        optimizer = engines.fused_adamw(model, CHECK_LEARNING_RATE)
        if method == "reflora":
            ReferenceRefLoRA([(pair.lora_a, pair.lora_b) for pair in find_pairs(model)], optimizer, CONFIG)
        losses[method] = []
        for batch in batches:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[method].append(loss.item())
    return losses


def _losses(trainee: engines.Trainee, batches: list[Batch]) -> list[float]:
    """Return the mean losses of RefLoRA steps, with each rank on its part of the batches."""
    handle = attach(trainee.model, trainee.optimizer, CONFIG)
    losses = []
    for batch in batches:
        part = batch.chunk(dist.get_world_size())[dist.get_rank()]
        loss = trainee.model(input_ids=part, labels=part).loss
        trainee.backward(loss)
        trainee.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(float(mean))
    handle.detach()
    return losses


def check_losses(engine: str, ranks: int, losses: list[float], expected: dict[str, list[float]]) -> None:
    """Check that an engine trains like the plain RefLoRA, and that the check can tell LoRA from RefLoRA.

    Raises:
        RuntimeError: the losses differ, or LoRA would pass the check, too.
    """

    def distance(others: list[float]) -> float:
        return float(np.abs(np.divide(losses, others) - 1).max())  # NaN if any of them is

    if not distance(expected["reflora"]) < CHECK_TOLERANCE:
        raise RuntimeError(
            f"{engine} on {ranks} ranks: losses {losses} are not those of the plain RefLoRA {expected['reflora']} "
            f"(relative difference {distance(expected['reflora']):.1e}); nothing is timed"
        )
    if distance(expected["lora"]) < 5 * CHECK_TOLERANCE:
        raise RuntimeError(f"LoRA {expected['lora']} and RefLoRA {losses} cannot be told apart: the check is void")


def _time_training(
    trainee: engines.Trainee, batch_size: int, job: dict[str, Any], vocab_size: int, device: torch.device
) -> dict[str, Any]:
    """Time blocks of steps with and without the method in turn, in milliseconds. A block's first step is left out."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"optimizer_step_ms": [], "training_step_ms": []} for name in ("lora", "reflora")
    }
    generator = torch.Generator().manual_seed(job["seed"] + dist.get_rank())
    report: dict[str, Any] = {}
    for block in range(2 * job["blocks"]):
        name = ("lora", "reflora")[block % 2]
        handle = attach(trainee.model, trainee.optimizer, CONFIG) if name == "reflora" else None
        for step in range(job["steps"] + 1):
            batch = torch.randint(vocab_size, (batch_size, job["seq_len"]), generator=generator).to(device)
            elapsed = _timed_step(trainee, batch, device)
            for key, values in times[name].items():
                values.extend([elapsed[key]] if step else [])
        if handle is not None:
            report = handle.report().as_dict()
            if report["applied_steps"] != report["steps"] or report["skipped_pairs"]:
                raise RuntimeError(f"RefLoRA was not applied in every step to every pair: {report}")
            handle.detach()
    tokens = dist.get_world_size() * batch_size * job["seq_len"]
    variants = {
        name: {key: timing.spread(values) for key, values in variant.items()} for name, variant in times.items()
    }
    for variant in variants.values():
        variant["tokens_per_second"] = 1e3 * tokens / variant["training_step_ms"]["median"]
    return {"batch_size": batch_size, "tokens_per_step": tokens, "variants": variants, "report": report}


def _timed_step(trainee: engines.Trainee, batch: Batch, device: torch.device) -> dict[str, float]:
    start = timing.now(device)
    trainee.backward(trainee.model(input_ids=batch, labels=batch).loss)
    middle = timing.now(device)
    trainee.step()
    end = timing.now(device)
    return {"optimizer_step_ms": 1e3 * (end - middle), "training_step_ms": 1e3 * (end - start)}


class AddedTime:
    """Attach RefLoRA and time its hooks, with hooks before and after them: hooks run in the order of registration."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, device: torch.device) -> None:
        self._device = device
        inner = optimizer
        while not isinstance(inner, torch.optim.Optimizer):
            inner = inner.optimizer
        hooks = [inner.register_step_pre_hook(self._begin), inner.register_step_post_hook(self._begin)]
        self.handle = attach(model, optimizer, CONFIG)
        self._hooks = [*hooks, inner.register_step_pre_hook(self._end), inner.register_step_post_hook(self._end)]
        self._start = self._seconds = 0.0

    def _begin(self, *_: Any) -> None:
        self._start = timing.now(self._device)

    def _end(self, *_: Any) -> None:
        self._seconds += since(self._start, self._device)

    def take(self) -> float:
        """Return the seconds on this rank since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def detach(self) -> None:
        self.handle.detach()
        for hook in self._hooks:
            hook.remove()


def measure_events(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Time bare collectives, packing and steps on whole factors in turn, and count their events.

    Returns:
        For each a dictionary ``{"kind", "size", "ranks", "counts", "seconds"}``.
    """
    points = [*collectives(device), *packings(device), *_whole_steps(device)]
    times: list[list[float]] = [[] for _ in points]
    for round_ in range(WARM_UP_ROUNDS + rounds):
        for point, values in zip(points, times, strict=True):
            elapsed = point["run"]()
            values.extend([elapsed] if round_ >= WARM_UP_ROUNDS else [])
    for point in points:
        del point["run"]
    return [
        {**point, "ranks": dist.get_world_size(), "seconds": timing.spread(_slowest(values))}
        for point, values in zip(points, times, strict=True)
    ]


def _whole_steps(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield steps on whole factors, which send nothing: Gram matrices, the solve and products."""
    evicted = torch.zeros(EVICTED_BYTES // 4, device=device)
    for size in WHOLE_SIZES:
        shape, lora_rank = _shape(*size[:2]), size[2]
        model = models.build_model(shape, lora_rank, device)
        optimizer = engines.fused_adamw(model)
        factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        added = AddedTime(model, optimizer, device)

        def run(
            optimizer: torch.optim.Optimizer = optimizer,
            factors: list[torch.Tensor] = factors,
            added: AddedTime = added,
        ) -> float:
            evicted.add_(1)
            for factor in factors:
                factor.grad = torch.full_like(factor, 1e-3)
            optimizer.step()
            return added.take()

        adapters = cost_model.Adapters.of(shape, lora_rank)
        elements = adapters.elements_a + adapters.elements_b
        counts = cost_model.compute(adapters, elements, elements)
        yield {"kind": "whole factors", "size": _name(size), "counts": counts, "run": run}


def sharded_step(engine: str, size: tuple[int, int, int], rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure what RefLoRA adds to a step of an engine: events, times, and the bytes that each rank sent."""
    shape, lora_rank = _shape(*size[:2]), size[2]
    ranks = dist.get_world_size()
    trainee = engines.wrap(engine, models.build_model(shape, lora_rank, device))
    added = AddedTime(trainee.model, trainee.optimizer, device)
    times = []
    for step in range(WARM_UP_ROUNDS + rounds):
        batch = torch.randint(shape.vocab_size, (1, 16), generator=torch.Generator().manual_seed(step)).to(device)
        trainee.backward(trainee.model(input_ids=batch, labels=batch).loss)
        trainee.step()
        times.append(added.take())
    sent: list[Any] = [None] * ranks
    dist.all_gather_object(sent, added.handle.report().bytes_per_step)
    added.detach()
    topology, adapters = cost_events.Topology(ranks, ranks), cost_model.Adapters.of(shape, lora_rank)
    layout = engine.removesuffix("-flat")
    way = "tall" if engines.stores_tall(engine) else "flat"
    steps = cost_model.step_counts(way, adapters, topology, layout=layout, device=device.type)
    return {
        "kind": f"step of {engine}",
        "size": _name(size),
        "ranks": ranks,
        "counts": cost_events.merge(*(choices[0] for choices in steps)),  # the ranks of one node use the ring
        "sent_bytes": sent,
        "predicted_bytes": cost_model.sent_bytes(way, adapters, ranks, layout, device.type).tolist(),
        "seconds": timing.spread(_slowest(times[WARM_UP_ROUNDS:])),
    }


def _shape(hidden_size: int, num_layers: int) -> models.ModelShape:
    return models.ModelShape(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 43 // 16,  # as in the "small" shape
        num_layers=num_layers,
        num_heads=max(1, hidden_size // 64),
        num_key_value_heads=max(1, hidden_size // 64),
        vocab_size=256,
    )


def _name(size: tuple[int, int, int]) -> str:
    return f"hidden {size[0]}, {size[1]} layers, r={size[2]}"


def _slowest(seconds: list[float]) -> list[float]:
    """Return the slowest rank's time of each measurement."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seconds)
    return [max(values) for values in zip(*gathered, strict=True)]


def _broadcast(value: Any) -> list[Any]:
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder


if __name__ == "__main__":
    main()
