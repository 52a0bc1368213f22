"""Rehearsal of a run in a separate process, which sees no GPU and no launcher.

That process (``small_run``) trains a tiny model for one step with the run's configuration files.
"""

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
_servers: dict[int, subprocess.Popen[str]] = {}  # by process id: a fork must not use its parent's server


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """The result of a rehearsal.

    Attributes:
        refusal: the library that raised an error, and its message; None if there was no error.
        foreign: whether DeepSpeed knows no key of its file.
        beyond: why the rehearsal ended without saying anything about the files; None if it ran to the end.
        warnings: the libraries' warnings.
        findings: findings about DeepSpeed's final configuration.
        setup: the fields of DeepSpeed's ``Setup``; None under another engine.
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
    """Rehearse a run, and return the result.

    Args:
        accelerate: path of accelerate's file; None if another launcher starts the run.
        deepspeed: path of DeepSpeed's file, as the trainer's option; None if there is none.
        arguments: transformers' TrainingArguments that differ from their defaults.
        size: numbers of ranks and machines.
        options: the doctor's options.
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
    try:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        sentence = f"the process of the rehearsal has ended with exit code {server.wait()}"
        return Outcome(refusal={"library": "Python", "sentence": sentence})
    return Outcome(**json.loads(answer))


def report(where: str, contents: dict[str, Any], outcome: Outcome, findings: Findings) -> bool:
    """Add a rehearsal's result to the findings, and return whether no library refused the run.

    Args:
        where: the file, for findings.
        contents: its contents.
        outcome: the result.
        findings: receives the result.
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
        findings.warning(where, f"could be tried in small only in part: {outcome.beyond}")
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
