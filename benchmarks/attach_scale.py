"""Measure what ``attach`` costs one rank of many: bytes received, seconds, memory. The other ranks do not exist.

    python benchmarks/attach_scale.py --model 70b --ranks 4096 --output result.json

torch's fake process group stands for the other ranks. A collective returns at once, with this rank's own input in place
of the others', so the figures contain no time on the wire. The model's base is on the meta device. Its adapters hold
this rank's pieces as ZeRO-3 and FSDP2 cut them. Each engine is measured in a process of its own (Linux), twice: first
time and the growth of the resident set to its peak, undisturbed; then the bytes that every collective delivers.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import models
from benchmarks.harness.options import parse, require_known, require_positive
from reflora_dist.command_line.help import answer_help

ENGINES = ("zero3", "fsdp2", "zero3-flat", "fsdp2-flat")


@dataclasses.dataclass
class Arguments:
    """The model and the number of ranks."""

    model: str = dataclasses.field(default="70b", metadata={"help": f"one of {', '.join(models.SHAPES)}"})
    num_layers: int | None = dataclasses.field(default=None, metadata={"help": "instead of the model's own number"})
    lora_rank: int = 16
    ranks: int = 4096
    rank: int | None = dataclasses.field(default=None, metadata={"help": "the one that is measured (the middle one)"})
    engines: list[str] = dataclasses.field(
        default_factory=lambda: list(ENGINES),
        metadata={"help": f"of {', '.join(ENGINES)}; flat: lora_A as PEFT stores it"},
    )
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        require_known(self, model=models.SHAPES)
        require_positive(self, "num_layers", "lora_rank", "ranks")
        if self.rank is None:
            self.rank = self.ranks // 2
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"--rank {self.rank} is none of {self.ranks}")
        if unknown := [engine for engine in self.engines if engine not in ENGINES]:
            raise ValueError(f"--engines {' '.join(unknown)} unknown; choose from {', '.join(ENGINES)}")

    @property
    def shape(self) -> models.ModelShape:
        """The model's shape, with the number of layers of the options."""
        return models.shape_of(self.model, self.num_layers)


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.harness import engines, recording
from benchmarks.harness.deliveries import Deliveries
from benchmarks.harness.workloads import meta_adapters
from benchmarks.reports.attach_scale import markdown
from reflora_dist import RefLoRAConfig, attach, tall_adapters
from reflora_dist.engines.pairs import AdapterPair, find_pairs

LIMITS = {"received_bytes": 10e6, "seconds": 3.0, "grown_bytes": 100e6}  # for tall adapters, on any number of ranks
CONFIG = RefLoRAConfig(method="reflora")


def main() -> None:
    arguments = parse(Arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stand-ins are on the CPU
    device = engines.single_process_device("it plays one of the ranks itself")
    by_engine = {engine: _in_a_process(arguments, engine) for engine in arguments.engines}
    recording.publish("attach_scale", arguments, device, {"limits": LIMITS, "engines": by_engine}, markdown)


def _in_a_process(arguments: Arguments, engine: str) -> dict[str, Any]:
    """Call ``measure`` in a fork of this process, whose memory nothing else has used."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (arguments, engine))


def measure(arguments: Arguments, engine: str) -> dict[str, Any]:
    """Measure ``attach`` on one rank: first undisturbed, then counting the bytes that collectives deliver."""
    with fake_ranks(arguments.rank or 0, arguments.ranks):
        model, optimizer = shard(arguments, engine)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free but resident could be used without growth
        before = _reset_peak()
        start = time.perf_counter()
        handle = attach(model, optimizer, CONFIG)
        seconds = time.perf_counter() - start
        grown = _resident("VmHWM") - before
        report = handle.report()
        handle.detach()
        with Deliveries() as deliveries:
            attach(model, optimizer, CONFIG).detach()
    return {
        "layout": report.layout,
        "num_pairs": report.num_pairs,
        "received_bytes": deliveries.bytes,
        "seconds": seconds,
        "grown_bytes": grown,
        "collectives": [call._asdict() for call in deliveries.calls],
    }


@contextlib.contextmanager
def fake_ranks(rank: int, ranks: int) -> Iterator[None]:
    """Make a process group in which only this rank exists."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(arguments: Arguments, engine: str) -> tuple[nn.Module, Any]:
    """Return the model with this rank's pieces of its adapters, and the optimizer as the engine returns it."""
    model = meta_adapters(arguments.shape, arguments.lora_rank)
    if engines.stores_tall(engine):
        tall_adapters(model)
    pairs = find_pairs(model)
    if engine.startswith("fsdp2"):
        return model, _as_fsdp2(model, pairs)
    return model, DeepSpeedZeroOptimizer_Stage3(pairs)


def _as_fsdp2(model: nn.Module, pairs: list[AdapterPair]) -> torch.optim.Optimizer:
    """Make parameters as ``fully_shard`` leaves them. ``fully_shard`` itself takes minutes for so many ranks."""
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    for module, name, factor in _owned(pairs):
        chunk = -(-factor.shape[0] // mesh.size())
        rows = max(0, min(chunk, factor.shape[0] - dist.get_rank() * chunk))
        local = torch.full((rows, factor.shape[1]), 0.01)
        sharded = DTensor.from_local(
            local, mesh, (Shard(0),), run_check=False, shape=factor.shape, stride=factor.stride()
        )
        setattr(module, name, nn.Parameter(sharded))
    return engines.fused_adamw(model)


class DeepSpeedZeroOptimizer_Stage3:
    """Stand-in for DeepSpeed's optimizer with the attributes that the package reads, and one sub-group.

    Parameters are empty outside of their layer's forward. Their masters lie in one flat buffer.
    """

    __module__ = "deepspeed.stand_in"

    def __init__(self, pairs: list[AdapterPair]) -> None:
        ranks = dist.get_world_size()
        parameters: list[Any] = []
        for module, name, factor in _owned(pairs):
            parameter: Any = nn.Parameter(torch.empty(0))
            size = -(-factor.numel() // ranks)
            parameter.ds_id, parameter.ds_numel = len(parameters), factor.numel()
            parameter.partition_numel = lambda size=size: size
            setattr(module, name, parameter)
            parameters.append(parameter)
        self.fp16_groups = [parameters]
        held = sum(parameter.partition_numel() for parameter in parameters)
        self.fp32_partitioned_groups_flat = [nn.Parameter(torch.full((held,), 0.01))]
        self.optimizer = torch.optim.AdamW(self.fp32_partitioned_groups_flat, lr=1e-4)

    def _get_sub_group_process_group(self, index: int) -> dist.ProcessGroup | None:
        return dist.group.WORLD


def _owned(pairs: list[AdapterPair]) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Yield the module and name of every factor, and the factor."""
    for pair in pairs:
        for module, name in pair.owners():
            yield module, name, getattr(module, name)


def _reset_peak() -> int:
    """Reset the peak of the resident set. Return the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
