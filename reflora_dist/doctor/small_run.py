"""The program ``python -m reflora_dist.doctor.small_run``: it runs the rehearsals that ``rehearsal`` requests.

In a rehearsal transformers' Trainer trains a model of two layers for one step, launched as the configuration files say.
The process acts as rank 0 of their number of ranks; the other ranks do not exist. Each rehearsal runs in a fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..files.open_files import read_json
from ..step.method_optimizers import METHOD_OPTIMIZERS
from .base_model import load_config
from .deepspeed_config import judge, knows_any
from .findings import Findings
from .options import DoctorOptions
from .refusals import heard, refusal
from .stand_in import NeedsDeviceError, join, prepare

_SECONDS = 120  # timeout; a rehearsal takes one or two
_RING_ATTENTION = "flash_attention_for_cpu.default does not have a sharding strategy"  # torch has none on CPUs
_TINY = LlamaConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=32,
)


def main() -> None:
    """Answer the requests on standard input, one per line, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the libraries' prints out of the answers
    torch.set_num_threads(1)
    prepare()
    _adapted()  # fills the caches of PEFT and transformers, which the forks inherit
    gc.freeze()  # libraries collect garbage often; this excludes all objects that exist now
    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            with os.fdopen(write, "w") as answer:
                json.dump(outcome(json.loads(line)), answer)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        _, status = os.waitpid(child, 0)
        ended = f"it ended with {os.waitstatus_to_exitcode(status)}, and takes at most {_SECONDS} s"
        answers.write((text or json.dumps({"beyond": ended})) + "\n")
        answers.flush()


def outcome(request: dict[str, Any]) -> dict[str, Any]:
    """Run a rehearsal and return the fields of its ``rehearsal.Outcome``."""
    signal.alarm(_SECONDS)
    os.chdir(request["folder"])
    with heard() as warnings:
        try:
            with tempfile.TemporaryDirectory() as output:
                came = _run(request, output)
        except BaseException as error:  # includes SystemExit, which a launcher's parser raises
            came = {"refusal": refusal(error)}
    return {**came, "warnings": warnings, "foreign": "refusal" in came and _is_foreign(request["deepspeed"])}


def _is_foreign(path: str | None) -> bool:
    """Return whether a file is no DeepSpeed configuration."""
    return path is not None and not knows_any(read_json(Path(path)))


def _run(request: dict[str, Any], output: str) -> dict[str, Any]:
    options = DoctorOptions(**request["options"])
    trainer = _started(request, options, output)
    came: dict[str, Any] = {}
    try:
        with _sized_as(options.model):
            trainer.train()
    except NeedsDeviceError as error:
        came["beyond"] = f"{error} needs a GPU"
    except Exception as error:  # every kind
        if _shares_sequences(error):
            came["beyond"] = "ranks that share sequences are needed"
        else:
            came["refusal"] = refusal(error)
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        # values that a library refused may have types that judge cannot handle either
        with contextlib.suppress(*(Exception,) if "refusal" in came else ()):
            came |= _judged(request, options, trainer)
    return came


def _shares_sequences(error: BaseException) -> bool:
    """Return whether a run ended where it needed torch's ring attention, or the other ranks of Ulysses."""
    raised_in = [Path(frame.filename).name for frame in traceback.extract_tb(error.__traceback__)]
    return "ulysses_sp.py" in raised_in or _RING_ATTENTION in str(error)


def _started(request: dict[str, Any], options: DoctorOptions, output: str) -> Trainer:
    ranks, own, arguments = request["world_size"], request["deepspeed"], dict(request["arguments"])
    started = launch(request["accelerate"], ranks) if request["accelerate"] else ranks
    deepspeed = bool(own) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if started:
        join(started, deepspeed)
    if not deepspeed:
        _avoid_fp16(arguments)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    training = TrainingArguments(
        output_dir=output,
        deepspeed=own,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        accelerator_config={"use_configured_state": bool(started)},
        **arguments,
    )
    stand_in = _STAND_INS.get(options.method)
    trainer = _SmallBatches(
        model=_adapted(),
        args=training,
        train_dataset=_Rows(),
        callbacks=[_StopAfterOne()],
        optimizer_cls_and_kwargs=None if stand_in is None else (stand_in, {"lr": 1e-3}),
    )
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) == fsdp
    return trainer


def _judged(request: dict[str, Any], options: DoctorOptions, trainer: Trainer) -> dict[str, Any]:
    findings = Findings()
    where, size = request["deepspeed"] or request["accelerate"], (request["world_size"], request["num_nodes"])
    config, mesh = trainer.accelerator.state.deepspeed_plugin.deepspeed_config, trainer.accelerator.parallelism_config
    if mesh is not None and mesh.sp_size > 1:  # accelerate gives DeepSpeed the groups of ranks in its stead
        config = {**config, "sequence_parallel_size": mesh.sp_size}
    setup = judge(where, config, options, size, findings)
    if setup.accumulation != trainer.args.gradient_accumulation_steps:
        findings.error(
            where,
            f"DeepSpeed makes a step of {setup.accumulation} micro batches, the trainer of "
            f"{trainer.args.gradient_accumulation_steps}",
            '"gradient_accumulation_steps": "auto"',
        )
    return {"findings": findings, "setup": dataclasses.asdict(setup)}


def launch(path: str, ranks: int) -> int:
    """Set the environment variables that ``accelerate launch --config_file`` would set.

    Args:
        path: accelerate's file.
        ranks: number of ranks of the run.

    Returns:
        The number of ranks that it would start as a group; 0 if it would start one process without a group.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    group, variables = [0], dict[str, str]()

    def torchrun(arguments: Any) -> None:
        _check_torchrun(arguments)
        group[0] = ranks
        variables.update(os.environ)

    def process(command: list[str], env: dict[str, str]) -> Any:
        group[0] = ranks if command[0] == "deepspeed" else 0
        variables.update(env)
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    arguments = launch_command_parser().parse_args(["--config_file", path, "script.py"])
    with mock.patch("torch.distributed.run.run", torchrun), mock.patch("subprocess.Popen", process):
        launch_command(arguments)
    os.environ.update(variables)
    return group[0]


def _check_torchrun(arguments: Any) -> None:
    """Run the checks that torchrun makes before it starts processes."""
    from torch.distributed.elastic.rendezvous import registry
    from torch.distributed.run import config_from_args

    config, _, _ = config_from_args(arguments)
    if config.nproc_per_node < 1:
        raise ValueError(f"{config.nproc_per_node} processes per machine")
    if config.rdzv_backend != "static" and config.rdzv_backend not in registry.handler_registry._registry:
        raise ValueError(f"rdzv_backend {config.rdzv_backend!r} is unknown")


def _avoid_fp16(arguments: dict[str, Any]) -> None:
    """Replace fp16 by bf16: outside DeepSpeed accelerate needs a GPU for fp16's loss scaling."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if arguments.pop("fp16", False):
        arguments["bf16"] = True


class _Rows:
    """A data set with more rows than any run reads."""

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}


class _SmallBatches(Trainer):
    """A large batch says no more than a small one, and takes memory."""

    def get_train_dataloader(self) -> Any:
        super().get_train_dataloader()  # which says what is wrong with the size
        self._train_batch_size = 2
        return super().get_train_dataloader()


class _StopAfterOne(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_log = True


# Stand-ins for the package's optimizers of these names: to DeepSpeed both are optimizers that it does not know.
_STAND_INS = {name: type(kind.__name__, (torch.optim.SGD,), {}) for name, kind in METHOD_OPTIMIZERS.items()}


def _adapted() -> PeftModel:
    base = LlamaForCausalLM(_TINY)
    _rename(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    model.enable_input_require_grads()
    return model


def _rename(base: LlamaForCausalLM) -> None:
    """Rename module classes so that FSDP finds those that the file wraps.

    ``diagnosis`` checks whether the run's own model has them.
    """
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    for layer in base.model.layers:
        modules = [layer, layer.mlp, layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm]
        for module, name in zip(modules, filter(str.isidentifier, names), strict=False):
            module.__class__ = type(name, (type(module),), {})


@contextlib.contextmanager
def _sized_as(model: str | None) -> Iterator[None]:
    """Let transformers fill in the "auto" values that depend on the model's size for the run's own model."""
    if model is None:
        yield
        return
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    fill, sizes = HfTrainerDeepSpeedConfig.trainer_config_finalize, SimpleNamespace(config=load_config(model))
    with mock.patch.object(
        HfTrainerDeepSpeedConfig, "trainer_config_finalize", lambda self, args, _, steps: fill(self, args, sizes, steps)
    ):
        yield


if __name__ == "__main__":
    main()
