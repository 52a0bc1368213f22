"""What the libraries themselves do with a configuration: the oracle of the doctor's verdicts.

It shares no code with the doctor. finetune.py's arguments and transformers' Trainer train one step of a small model,
in a real gloo group of one rank or, where a file needs more, as rank 0 of torch's fake group.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import str_to_bool
from deepspeed.ops.op_builder.builder import OpBuilder
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.distributed.run import config_from_args
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, default_data_collator

from launchers.training.arguments import FinetuneArguments
from tests.support.engines_under_test.accelerated import fsdp_on_cpu
from tests.support.engines_under_test.zero import allow_fp16_on_cpu

_LAUNCHED = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
_SECONDS = 120


def refusal(path: Path, ranks: int = 1) -> str | None:
    """The error that a run with this file ends in, tried in a process of its own; None if it trains.

    Args:
        ranks: of a run with DeepSpeed's file; accelerate's says how many it starts.
    """
    _warm_up()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        signal.alarm(_SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        message = ""
        try:
            _run(path, ranks)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        with os.fdopen(write, "w") as answer:
            json.dump(message, answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    assert text, f"the oracle ended with {os.waitstatus_to_exitcode(status)} on {path}"
    return json.loads(text) or None


@functools.cache
def _warm_up() -> None:
    """What PEFT and transformers make once and keep, forks then find made."""
    small_model()


def _run(path: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what earlier tests of the process left
    gc.freeze()  # DeepSpeed collects garbage often: it need not walk through what was there before
    allow_fp16_on_cpu()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(OpBuilder, "load", mock.MagicMock()):
        if path.suffix == ".json":
            options = {"deepspeed": str(path), **_options(json.loads(path.read_text()), ranks)}
        else:
            ranks, options = _launch(path)
        if ranks:
            _join(ranks, Path(folder))
        with fsdp_on_cpu():
            trainer = _trainer(FinetuneArguments(output_dir=folder, report_to="none", disable_tqdm=True, **options))
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            assert str(trainer.accelerator.distributed_type).endswith("FSDP")
        trainer.train()


def _join(ranks: int, folder: Path) -> None:
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in rank.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    if ranks == 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def _launch(path: Path) -> tuple[int, dict[str, Any]]:
    """Let accelerate launch up to the processes: how many (0: one without a group), and finetune.py's options."""
    started: dict[str, Any] = {}

    def torchrun(arguments: Any) -> None:
        config = config_from_args(arguments)[0]
        parameters = RendezvousParameters(
            config.rdzv_backend, config.rdzv_endpoint, "id", config.min_nodes, config.max_nodes, **config.rdzv_configs
        )
        registry.get_rendezvous_handler(parameters)
        assert config.nproc_per_node > 0
        started.update(ranks=config.nproc_per_node * config.max_nodes, environment=dict(os.environ))

    def process(command: list[str], env: dict[str, str]) -> Any:
        started.update(ranks=0, environment=env)
        return SimpleNamespace(wait=lambda: None, returncode=0)

    with mock.patch("torch.distributed.run.run", torchrun), mock.patch("subprocess.Popen", process):
        launch_command(launch_command_parser().parse_args(["--config_file", str(path), __file__]))
    os.environ.update(started["environment"])
    content = yaml.safe_load(path.read_text())
    section = content.get("deepspeed_config")
    options = _options(section if isinstance(section, dict) else {}, started["ranks"] or 1)
    _without_gpu(options)
    return started["ranks"], options


def _without_gpu(options: dict[str, Any]) -> None:
    """What accelerate would want a GPU for, after it was looked at: fp16 outside DeepSpeed, and FSDP1's broadcast."""
    said = os.environ["ACCELERATE_MIXED_PRECISION"]
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    options |= {"fp16": said == "fp16" and deepspeed, "bf16": said != "fp16" or not deepspeed}
    if said == "fp16" and not deepspeed:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    for name in ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        if os.environ.get("FSDP_VERSION") == "1" and str_to_bool(os.environ[name]):
            os.environ[name] = "false"


def _options(config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """finetune.py's options that say the same as the file's numbers, where a command line can."""

    def inner(*path: str) -> Any:
        value: Any = config
        for name in path:
            value = value.get(name, "auto") if isinstance(value, dict) else "auto"
        return value

    def number(*path: str, kind: type = float) -> Any:
        value = inner(*path)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and kind(value) == value
        return kind(value) if usable else None

    together = number("train_batch_size", kind=int)
    parallel = number("train_micro_batch_size_per_gpu", kind=int) or (together and max(1, together // ranks))
    accumulation = number("gradient_accumulation_steps", kind=int)
    rate = number("optimizer", "params", "lr")
    fp16, bf16 = inner("fp16", "enabled"), inner("bf16", "enabled")
    use_bf16 = bf16 is True or (bf16 == "auto" and "bf16" in config and fp16 is not True)
    found = {
        "per_device_train_batch_size": parallel,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": number("gradient_clipping"),
        "learning_rate": number("scheduler", "params", "warmup_max_lr") if rate is None else rate,
        "adam_epsilon": number("optimizer", "params", "eps"),
        "weight_decay": number("optimizer", "params", "weight_decay"),
        "warmup_steps": number("scheduler", "params", "warmup_num_steps", kind=int),
        "max_steps": number("scheduler", "params", "total_num_steps", kind=int) or 100,
        "bf16": use_bf16,
        "fp16": not use_bf16 and (fp16 is True or (fp16 == "auto" and "fp16" in config)),
    }
    options = {name: value for name, value in found.items() if value is not None}
    return {"per_device_train_batch_size": 1, **options}


class _Once(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def _trainer(arguments: FinetuneArguments) -> Trainer:
    arguments.logging_steps, arguments.eval_strategy, arguments.save_strategy = 1, "no", "no"
    arguments.eval_on_start = False
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2048
    return Trainer(small_model(), arguments, default_data_collator, rows, callbacks=[_Once()])


def small_model() -> PeftModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, **sizes))
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    model.enable_input_require_grads()
    return model
