"""The program ``python -m reflora_dist.doctor CONFIG...``, alone or under torchrun, accelerate launch or deepspeed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
import warnings

from ..command_line.help import answer_help
from .options import CONFIGS_HELP, DoctorOptions, launched, parse_options

if __name__ == "__main__":
    answer_help(
        f"Predict what a run would do, before it starts.\n\nCONFIG: {CONFIGS_HELP}",
        {"options": DoctorOptions},
        usage="python -m reflora_dist.doctor [CONFIG ...] [options]",
    )

import torch
import torch.distributed as dist

from .diagnosis import Diagnosis, diagnose, to_json
from .ranks import compare, environment, gather, join, names, smallest_memory_gib, time_collectives
from .tables import text


def main(argv: list[str] | None = None) -> int:
    """Print a diagnosis, on rank 0 only.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0 if the run can work, 1 if it cannot, 2 for a wrong command line.

    Communication: under a launcher every rank must call; gathers of objects, and the timed collectives.
    """
    try:
        configs, options = parse_options(argv)
        together = launched()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _be_quiet()
    device = join() if together else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.redirect_stdout(sys.stderr):  # libraries print, and --json must stay readable
        diagnosis = _together(configs, options, device) if together else _alone(configs, options, device)
    if int(os.environ.get("RANK", "0")) == 0:
        print(to_json(diagnosis) if options.json else text(diagnosis), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return int(diagnosis.findings.failed)


def _be_quiet() -> None:
    """Silence the libraries' own warnings, which would hide the findings."""
    warnings.filterwarnings("ignore")
    for library in ("transformers", "accelerate", "peft", "torch", "DeepSpeed"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _alone(configs: list[str], options: DoctorOptions, device: torch.device) -> Diagnosis:
    options.gpu_memory_gib = options.gpu_memory_gib or smallest_memory_gib(device)
    return diagnose(configs, options)


def _together(configs: list[str], options: DoctorOptions, device: torch.device) -> Diagnosis:
    """Diagnose on every rank, compare the ranks, and time the collectives."""
    options.gpu_memory_gib = options.gpu_memory_gib or smallest_memory_gib(device)
    memories = [memory for memory in gather(options.gpu_memory_gib) if memory is not None]
    asked = dataclasses.asdict(options)
    options.gpu_memory_gib = min(memories) if memories else None
    diagnosis = diagnose(configs, options, device)
    own = {
        "files": diagnosis.files,
        "options": asked,
        "versions": {row.package: row.installed for row in diagnosis.versions},
        "environment": environment(),
        "host": socket.gethostname(),
        "errors": [finding for finding in diagnosis.findings if finding.level == "error"],
        "sends": diagnosis.method_sends,
    }
    everyone = gather(own)
    ranks = names(len(everyone), [other["host"] for other in everyone])
    for what in ("files", "options", "versions"):
        compare(what, dict(zip(ranks, (other[what] for other in everyone), strict=True)), diagnosis.findings)
    environments = dict(zip(ranks, (other["environment"] for other in everyone), strict=True))
    compare("environment", environments, diagnosis.findings, is_error=False)
    seen = set(diagnosis.findings)
    for rank, other in zip(ranks, everyone, strict=True):
        for finding in other["errors"]:
            if finding not in seen:
                seen.add(finding)
                diagnosis.findings.append(finding._replace(where=f"{rank}: {finding.where}"))
    agreed = all(other["sends"] == own["sends"] for other in everyone)
    if gather(agreed and own["sends"] is not None) == [True] * len(everyone):
        assert diagnosis.traffic is not None and diagnosis.setup is not None
        diagnosis.measured = time_collectives(diagnosis.traffic, diagnosis.setup.shard_size, device)
    return diagnosis


if __name__ == "__main__":
    sys.exit(main())
