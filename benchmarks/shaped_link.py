"""Measure a step on a slow link: whole factors are sent, a flat lora_A to its owners, or Gram matrices alone.

    python benchmarks/shaped_link.py --output result.json

The script makes two hosts on this machine (``two_hosts``; needs root and iproute2) and slows their link with `tc`. Then
``launchers/multinode.sh`` runs ``overhead.py`` on one rank of each, which times the optimizer step of adapters. Whole
factors are gathered in one collective, with their gradients. A flat lora_A goes to its owner and its gradient back,
beside the Gram matrices. With lora_A stored tall, RefLoRA sends only the Gram matrices.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import models
from benchmarks.harness.options import parse, require_known, require_positive
from reflora_dist.command_line.help import answer_help


@dataclasses.dataclass
class Arguments:
    """The model, the links, and the numbers of blocks and steps."""

    model: str = dataclasses.field(default="small", metadata={"help": f"one of {', '.join(models.SHAPES)}"})
    num_layers: int | None = dataclasses.field(default=None, metadata={"help": "instead of the model's own number"})
    lora_rank: int = 16
    mbits: list[int] = dataclasses.field(
        default_factory=lambda: [0, 1000, 100],
        metadata={"help": "rates of the link, Mbit/s in each direction; 0: as fast as the machine copies"},
    )
    blocks: int = dataclasses.field(default=4, metadata={"help": "blocks of steps per variant, taking turns"})
    steps: int = dataclasses.field(default=8, metadata={"help": "measured steps per block"})
    timeout: float = dataclasses.field(default=900.0, metadata={"help": "seconds for one launch"})
    output: str | None = dataclasses.field(default=None, metadata={"help": "JSON file to write"})

    def __post_init__(self) -> None:
        require_known(self, model=models.SHAPES)
        if not self.mbits or min(self.mbits) < 0:
            raise ValueError(f"--mbits {self.mbits} must be one or more rates, 0 for an unshaped link")
        require_positive(self, "num_layers", "lora_rank", "blocks", "steps", "timeout")


if __name__ == "__main__":
    answer_help(__doc__, {"options": Arguments})  # before libraries are imported, which takes seconds

from benchmarks.harness import engines, recording, timing
from benchmarks.harness.two_hosts import Host, run_on, two_hosts
from benchmarks.overhead import plain_variant
from benchmarks.reports.shaped_link import markdown

REPOSITORY = Path(__file__).resolve().parents[1]
RANKS = 2
ENGINE = "fsdp2"
# a variant of overhead.py, and what it sends
WAYS = (
    ("gather-coalesced", "whole factors"),
    ("reflora-flat", "flat lora_A, Grams"),
    ("reflora", "Grams alone"),
)


def main() -> None:
    arguments = parse(Arguments)
    device = engines.single_process_device("it makes its hosts and their ranks itself")
    results = measure(arguments)
    recording.publish("shaped_link", arguments, device, results, markdown, world_size=RANKS)


def measure(arguments: Arguments) -> dict[str, Any]:
    """Measure every way on every link. Return the ``results`` of the record."""
    measured = []
    with timing.progress(len(arguments.mbits), "launches") as advance:
        for mbit in arguments.mbits:
            with two_hosts(f"{mbit}mbit" if mbit else "") as hosts:
                run = launch(arguments, hosts)
                measured += [cell(mbit, run, *way) for way in WAYS]
                advance()
    sizes = {name: run[name] for name in ("lora_rank", "num_pairs", "adapter_parameters")}
    return {**sizes, "cells": measured}


def launch(arguments: Arguments, hosts: tuple[Host, Host]) -> dict[str, Any]:
    """Run ``overhead.py`` on both hosts. Return the run of its record.

    Raises:
        RuntimeError: a host failed; the message holds the end of what both printed.
    """
    options = {
        "model": arguments.model,
        "num_layers": arguments.num_layers,
        "lora_ranks": arguments.lora_rank,
        "blocks": arguments.blocks,
        "steps": arguments.steps,
        "engine": ENGINE,
    }
    with tempfile.TemporaryDirectory(prefix="shaped-link-") as folder:
        record = Path(folder) / "record.json"
        command = ["bash", REPOSITORY / "launchers" / "multinode.sh", "torchrun", "--nodes", str(RANKS)]
        command += ["--head", hosts[0].address, "--script", REPOSITORY / "benchmarks" / "overhead.py"]
        given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        given += ["--flat", "--breakdown", "--output", str(record), "--variants", "reflora", "gather-coalesced"]
        commands = [[*command[:3], "--node-rank", str(rank), *command[3:], *given] for rank in range(RANKS)]
        results = run_on(hosts, commands, arguments.timeout, PROCESSES="1", OMP_NUM_THREADS="1")
        if any(code for code, _ in results) or not record.exists():
            ends = zip(hosts, results, strict=True)
            raise RuntimeError("\n".join(f"{host.name} ended with {code}:\n{text}" for host, (code, text) in ends))
        (run,) = json.loads(record.read_text())["results"]["runs"]
        return run


def cell(mbit: int, run: dict[str, Any], variant: str, way: str) -> dict[str, Any]:
    """Return one way on one link: its step, the phases of the step, and the bytes that it sends."""
    figures = run["variants"][variant]
    if figures["report"] is not None:
        sent = figures["report"]["bytes_per_step"]
    else:  # float32 weights and gradients: this rank's pieces go to every other rank
        sent = 2 * 4 * run["adapter_parameters"] // RANKS * (RANKS - 1)
    return {
        "mbit": mbit,
        "way": way,
        "variant": variant,
        "step_ms": figures["step_ms"],
        "plain_step_ms": run["variants"][plain_variant(variant)]["step_ms"],
        "phases_ms": run["breakdown_ms"] if variant == "reflora" else run["other_breakdowns_ms"][variant],
        "bytes_per_step": sent,
        "link_ms": 1e3 * 8 * sent / (mbit * 1e6) if mbit else None,
        "largest_relative_error": run["largest_relative_error"].get(variant),
    }


if __name__ == "__main__":
    main()
