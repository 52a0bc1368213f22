"""Has a run tried in small by a process of its own, in which there is no GPU and no group of ranks."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .findings import Finding, Findings
from .options import DoctorOptions
from .refusals import remedy

_LAUNCHERS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "TORCHELASTIC_", "DEEPSPEED_")
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_WITHOUT_DEVICES = {
    **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), ""),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "disabled",
}
_servers: dict[int, subprocess.Popen[str]] = {}  # by process, since a fork must not use its parent's


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What came of a run in small.

    Attributes:
        refusal: the library that ended it, and its sentence; None if it went through.
        foreign: DeepSpeed knows no key of its file.
        beyond: at what it came to an end that says nothing about the files; None if it did not.
        warnings: of the libraries.
        findings: about DeepSpeed's configuration, as it was in the end.
        setup: what DeepSpeed would do; None under another engine.
    """

    refusal: dict[str, str] | None = None
    foreign: bool = False
    beyond: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    findings: list[list[str]] = dataclasses.field(default_factory=list)
    setup: dict[str, Any] | None = None


def rehearse(
    accelerate: str | None,
    deepspeed: str | None,
    arguments: dict[str, Any],
    size: tuple[int, int],
    options: DoctorOptions,
) -> Outcome:
    """Try a run in small.

    Args:
        accelerate: accelerate's file; None if another launcher starts the run.
        deepspeed: DeepSpeed's file, which is the trainer's option.
        arguments: transformers' TrainingArguments that differ from their defaults.
        size: ranks and machines.
        options: of the doctor.
    """
    request = {
        "folder": os.getcwd(),
        "accelerate": accelerate,
        "deepspeed": deepspeed,
        "arguments": arguments,
        "world_size": size[0],
        "num_nodes": size[1],
        "options": dataclasses.asdict(options),
    }
    server = _servers.get(os.getpid())
    if server is None or server.poll() is not None:
        server = _servers[os.getpid()] = _start()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        sentence = f"the process in which runs are tried in small has ended with exit code {server.wait()}"
        return Outcome(refusal={"library": "Python", "sentence": sentence})
    return Outcome(**json.loads(answer))


def report(where: str, contents: dict[str, Any], outcome: Outcome, findings: Findings) -> bool:
    """Note what came of it; whether it went through.

    Args:
        where: the file, for findings.
        contents: what is in it.
        outcome: what came of it.
        findings: to which it is added.
    """
    findings.extend(Finding(*found) for found in outcome.findings)
    for warning in outcome.warnings:
        findings.warning(where, warning)
    if outcome.foreign:
        findings.error(
            where,
            "there is no key that DeepSpeed knows",
            "give DeepSpeed's or accelerate's configuration; a model's config.json goes after --model",
        )
    if outcome.refusal is not None and not outcome.foreign:
        sentence = outcome.refusal["sentence"]
        findings.error(where, f"{outcome.refusal['library']} refuses it: {sentence}", remedy(sentence, contents))
    elif outcome.beyond is not None:
        findings.note(where, f"tried in small until {outcome.beyond}, which needs a GPU", "")
    return outcome.refusal is None


def _start() -> subprocess.Popen[str]:
    package = Path(__file__).resolve().parents[1]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS) and name not in _RANK
    }
    environment |= _WITHOUT_DEVICES
    environment["PYTHONPATH"] = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(
        [sys.executable, "-m", f"{package.name}.doctor.small_run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.close()
    server.wait()
    server.stdout.close()
