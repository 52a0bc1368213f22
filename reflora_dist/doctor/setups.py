"""From configuration files to a ``Setup``. The files' libraries decide in a rehearsal whether the run can start."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import torch

from . import accelerate_config
from .accelerate_config import accelerate_setup
from .arguments import deepspeed_precision, training_arguments
from .deepspeed_config import leaves
from .findings import Findings
from .options import DoctorOptions
from .rehearsal import rehearse, report
from .setup import Setup
from .values import count


def setup_of(
    for_accelerate: list[str],
    for_deepspeed: list[str],
    files: dict[str, Any],
    options: DoctorOptions,
    findings: Findings,
) -> Setup | None:
    """Return the setup that follows from the files; None, and an error in the findings, if a run could not start.

    Args:
        for_accelerate, for_deepspeed: the path of the file of each kind, or an empty list.
        files: the files' contents, by path.
        options: the doctor's options.
        findings: receives the problems.
    """
    path = for_accelerate[0] if for_accelerate else ""
    size = _size(path, files.get(path, {}), options, findings)
    if size is None:
        return None
    if for_accelerate:
        return _launched_setup(path, for_deepspeed, files, options, size, findings)
    if for_deepspeed:
        file = for_deepspeed[0]
        return _deepspeed_setup(
            None, file, files[file], deepspeed_precision(files[file], options), options, size, findings
        )
    world_size, num_nodes = size
    return Setup(
        engine="ddp" if world_size > 1 else "single",
        world_size=world_size,
        num_nodes=num_nodes,
        precision=options.mixed_precision or "bf16",
        micro_batch_size=options.micro_batch_size or 1,
        accumulation=options.gradient_accumulation_steps or 1,
        activation_checkpointing=options.activation_checkpointing,
    )


def _launched_setup(
    path: str,
    for_deepspeed: list[str],
    files: dict[str, Any],
    options: DoctorOptions,
    size: tuple[int, int],
    findings: Findings,
) -> Setup | None:
    """Return the setup under ``accelerate launch``, perhaps with a DeepSpeed file next to accelerate's."""
    arguments = accelerate_config.launch_arguments(path, files[path], findings)
    if arguments is None:
        return None
    if not accelerate_config.check_distributed_type(path, files[path], arguments, size[0], findings):
        return None
    if for_deepspeed and not arguments.use_deepspeed:
        kind = files[path].get("distributed_type")
        findings.error(
            path, f"distributed_type: {kind}, beside DeepSpeed's {for_deepspeed[0]}", "distributed_type: DEEPSPEED"
        )
        return None
    if arguments.use_deepspeed:
        accelerate_config.check_ulysses(path, arguments, size[0], findings)
        own = for_deepspeed[0] if for_deepspeed else None
        try:
            contents = files[own] if own else accelerate_config.deepspeed_contents(arguments)
        except ValueError as error:
            findings.error(path, str(error), "name DeepSpeed's JSON")
            return None
        from_file = own or getattr(arguments, "deepspeed_config_file", None)
        precision = (
            deepspeed_precision(contents, options)
            if from_file
            else accelerate_config.accelerate_precision(path, arguments, options, findings)
        )
        if precision is None:
            return None
        return _deepspeed_setup(path, own, contents, precision, options, size, findings)
    precision = accelerate_config.accelerate_precision(path, arguments, options, findings)
    if precision is None:
        return None
    outcome = rehearse(path, None, training_arguments({}, precision, options, size[0]), size, options)
    setup = None
    # values that a library refused may have types that this code cannot handle either
    with contextlib.suppress(*() if outcome.refusal is None else (TypeError, ValueError)):
        setup = accelerate_setup(path, arguments, precision, options, size, findings)
    return setup if report(path, {}, outcome, findings) else None


def _deepspeed_setup(
    path: str | None,
    own: str | None,
    contents: dict[str, Any],
    precision: str,
    options: DoctorOptions,
    size: tuple[int, int],
    findings: Findings,
) -> Setup | None:
    """Return DeepSpeed's setup, from accelerate's file ``path``, DeepSpeed's file ``own``, or both."""
    where = own or path
    assert where is not None
    if importlib.util.find_spec("deepspeed") is None:
        findings.error(where, "DeepSpeed is not installed", "pip install 'reflora_dist[deepspeed]'")
        return None
    autos = sum(value == "auto" for _, value in leaves(contents))
    if autos:
        findings.note(
            where,
            f'{autos} values are "auto": transformers\' Trainer and accelerate fill them in',
            "deepspeed.initialize in a loop of your own needs numbers",
        )
    outcome = rehearse(path, own, training_arguments(contents, precision, options, size[0]), size, options)
    if not report(where, contents, outcome, findings) or outcome.setup is None:
        return None
    return Setup(**outcome.setup)


def _size(path: str, config: dict[str, Any], options: DoctorOptions, findings: Findings) -> tuple[int, int] | None:
    """Return the numbers of ranks and machines: from the options, else the launcher, the file or this machine.

    None, and an error in the findings, if the file's values are unusable.
    """
    before = len(findings)
    processes, machines = (count(path, config, name, findings) for name in ("num_processes", "num_machines"))
    if len(findings) > before:
        return None
    if config.get("distributed_type") == "NO":
        processes = processes or 1  # accelerate's default
    launched = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None
    nodes = options.num_nodes
    if nodes is None and launched:
        nodes = max(1, launched // int(os.environ.get("LOCAL_WORLD_SIZE", launched)))
    nodes = nodes or machines or 1
    here = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    ranks = options.world_size or launched or processes or max(1, here) * nodes
    if not launched and ranks % nodes:
        findings.error(
            path or "--num_nodes",
            f"{ranks} ranks on {nodes} machines: every machine starts {ranks // nodes}, which makes "
            f"{ranks // nodes * nodes}",
            "num_processes (--world_size) is that of all machines together, a multiple of num_machines (--num_nodes)",
        )
        return None
    return ranks, nodes
