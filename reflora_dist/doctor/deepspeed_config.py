"""DeepSpeed's JSON, read by DeepSpeed's own classes after transformers has filled in "auto"."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from ..checkpoints.deepspeed_universal import is_round_robin
from .deepspeed_optimizer import check_optimizer, check_optimizer_params, check_scheduler, count_moments
from .deepspeed_zero import check_batch, check_zero
from .findings import Findings
from .options import DoctorOptions
from .setup import Setup
from .values import is_number, one_line

_TRAINER_CLIPS_AT = 1.0  # TrainingArguments.max_grad_norm
_STAGE_NAMES = {1: "zero1", 2: "zero2", 3: "zero3"}
# Trainer fills these in by the model's size and the number of steps.
_NEED_MODEL = {
    *(f"zero_optimization.{name}" for name in ("reduce_bucket_size", "stage3_prefetch_bucket_size")),
    "zero_optimization.stage3_param_persistence_threshold",
    "scheduler.params.total_num_steps",
    "scheduler.params.warmup_num_steps",
}


class _Asked(dict):
    """A dictionary that remembers which keys it was asked for: what a library never asks for has no effect."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Asked:
        return self


def deepspeed_setup(
    where: str,
    config: dict[str, Any],
    model_config: Any,
    options: DoctorOptions,
    size: tuple[int, int],
    findings: Findings,
) -> Setup | None:
    """Check a configuration, and say what DeepSpeed would do with it.

    Args:
        where: the file, for findings.
        config: its contents.
        model_config: of the model, by whose hidden size some keys are filled in; None if unknown.
        options: of the doctor.
        size: ranks and machines.

    Returns:
        None if it cannot be told; then there is an error among the findings.
    """
    try:
        import deepspeed.runtime.config  # noqa: F401
    except ImportError as error:
        findings.error(where, f"DeepSpeed is not installed ({error})", "pip install 'reflora_dist[deepspeed]'")
        return None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    autos = sorted(path for path, value in _leaves(config) if value == "auto")
    if autos:
        findings.note(
            where,
            f'{len(autos)} values are "auto": transformers\' Trainer and accelerate fill them in',
            "deepspeed.initialize in a loop of your own needs numbers",
        )
    if all(_section(config, name).get("enabled") is True for name in ("fp16", "bf16")):
        findings.error(where, "fp16 and bf16 are both enabled", 'enable one, or set both to "auto"')
        return None
    filled = _fill(where, config, model_config, options, size, findings)
    if filled is None:
        return None
    if not _check_autos(where, filled, model_config, findings):
        return None
    loaded = _load(where, filled, findings)
    if loaded is None:
        return None
    world_size, num_nodes = size
    check_zero(where, filled, loaded, size, findings)
    if "optimizer" in filled and loaded.optimizer_name is None:
        findings.error(where, "optimizer without type: DeepSpeed makes none", 'give its "type", or remove the section')
    if "scheduler" in filled and loaded.scheduler_name is None:
        findings.error(
            where,
            "scheduler without type: DeepSpeed makes none, and Trainer none either",
            'give its "type", or remove it',
        )
    check_optimizer(where, loaded, options, findings)
    check_optimizer_params(where, loaded, findings)
    check_scheduler(where, loaded, findings)
    if "gradient_clipping" not in config:
        findings.warning(
            where,
            f"gradient_clipping is absent, which is not off: DeepSpeed clips at {loaded.gradient_clipping}",
            'set it to a number, 0 for none, or "auto"',
        )
    setup = _setup(loaded, world_size, num_nodes)
    setup.activation_checkpointing = options.activation_checkpointing
    setup.moments = count_moments(where, loaded, options, findings)
    if options.mixed_precision not in (None, setup.precision):
        findings.error(
            where,
            f"--mixed_precision {options.mixed_precision}, but by this file DeepSpeed's is {setup.precision!r}",
            f'"{options.mixed_precision}": {{"enabled": "auto"}}',
        )
    if loaded.zero_optimization_stage == 0 and setup.precision != "no":
        findings.error(
            where,
            f"zero_optimization.stage=0 with {setup.precision}: attach refuses it, DeepSpeed's wrapper keeps masters "
            "that are not sharded",
            "set zero_optimization.stage to 1, 2 or 3",
        )
    return setup


def _check_autos(where: str, filled: dict[str, Any], model_config: Any, findings: Findings) -> bool:
    """Name every "auto" that is left; False where there is no going on."""
    left = {path for path, value in _leaves(filled) if value == "auto"}
    left -= set() if model_config is not None else _NEED_MODEL
    stage = "zero_optimization.stage"
    for path in sorted(left - {stage}):
        findings.warning(
            where, f'{path}: "auto" is filled in by nobody, and DeepSpeed may ignore it', "give a value, or remove it"
        )
    if stage in left:
        findings.error(where, f'{stage}: "auto" is filled in by nobody: ZeRO would be off', "give 1, 2 or 3")
    return stage not in left


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(config, dict):
        yield path, config
        return
    for key, value in config.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _fill(
    where: str,
    config: dict[str, Any],
    model_config: Any,
    options: DoctorOptions,
    size: tuple[int, int],
    findings: Findings,
) -> dict[str, Any] | None:
    """Replace "auto" as Trainer does, which also compares what is not "auto" with its own arguments."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    number = {key: value for key, value in config.items() if is_number(value)}
    precision = _precision(config, options)
    micro_batch_size, accumulation = _batch(number, options, size[0])
    try:
        optimizer_values = _optimizer_values(config)
    except ValueError as error:
        findings.error(where, str(error), "correct it")
        return None
    arguments = SimpleNamespace(
        world_size=size[0],
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=number.get("gradient_clipping", _TRAINER_CLIPS_AT),
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        fp16_full_eval=False,
        bf16_full_eval=False,
        save_on_each_node=False,
        get_warmup_steps=lambda steps: 1,
        **optimizer_values,
    )
    try:
        filled = HfTrainerDeepSpeedConfig(copy.deepcopy(config))
        filled.trainer_config_process(arguments)
        if model_config is not None:
            filled.trainer_config_finalize(arguments, SimpleNamespace(config=model_config), 1)
        elif filled.mismatches:
            raise ValueError("; ".join(filled.mismatches))
    except ValueError as error:
        remedy = 'set these values to "auto", or give theirs: --micro_batch_size, --gradient_accumulation_steps'
        findings.error(where, f"does not fit the options: {error}".replace("\n", " "), remedy)
        return None
    except Exception as error:  # whatever it does with values of another type
        findings.error(where, f"transformers refuses it: {one_line(error)}", "correct that key")
        return None
    finally:
        unset_hf_deepspeed_config()  # or transformers would partition the models that it builds from here on
    if "train_batch_size" in number:  # DeepSpeed would derive them from the ranks that are not there
        filled.config.setdefault("train_micro_batch_size_per_gpu", micro_batch_size)
        filled.config.setdefault("gradient_accumulation_steps", accumulation)
    return filled.config


def _batch(number: dict[str, Any], options: DoctorOptions, ranks: int) -> tuple[int, int]:
    """Micro batch and accumulation: the options', else the file's, else what its train_batch_size leaves for them."""
    micro_batch_size = options.micro_batch_size or number.get("train_micro_batch_size_per_gpu")
    accumulation = options.gradient_accumulation_steps or number.get("gradient_accumulation_steps")
    together = number.get("train_batch_size")
    of_each = together // ranks if isinstance(together, int) else 0
    if micro_batch_size is None:
        micro_batch_size = of_each // (accumulation or 1) or 1
    if accumulation is None:
        accumulation = of_each // (micro_batch_size or 1) or 1
    return micro_batch_size, accumulation


def _precision(config: dict[str, Any], options: DoctorOptions) -> str:
    """What the file says, else the option; by default bf16 where the file leaves that open."""
    enabled = {name: _section(config, name).get("enabled") for name in ("bf16", "fp16")}
    if options.mixed_precision is not None:
        return options.mixed_precision
    chosen = [name for name in enabled if enabled[name] is True] or [n for n in enabled if enabled[n] == "auto"]
    return chosen[0] if chosen else "no"


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _optimizer_values(config: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's hyperparameters mean nothing here: those of the file, so that they contradict nothing.

    Raises:
        ValueError: betas are not two.
    """
    params = _section(_section(config, "optimizer"), "params") | _section(_section(config, "scheduler"), "params")

    def given(name: str, otherwise: Any) -> Any:
        return params.get(name) if params.get(name, "auto") != "auto" else otherwise

    betas = given("betas", [0.9, 0.999])
    if not isinstance(betas, list) or len(betas) != 2:
        raise ValueError(f"optimizer.params.betas: {betas!r} is no list of two numbers")
    return {
        "learning_rate": given("lr", given("warmup_max_lr", 1e-4)),
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "adam_epsilon": given("eps", 1e-8),
        "weight_decay": given("weight_decay", 0.0),
    }


def _load(where: str, filled: dict[str, Any], findings: Findings) -> Any:
    """What DeepSpeed makes of it; None if it refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    # the ranks that DeepSpeed would multiply with are not there; transformers has compared the product
    config = _Asked({key: value for key, value in filled.items() if key != "train_batch_size"})
    dict.setdefault(config, "train_micro_batch_size_per_gpu", 1)
    try:
        loaded = DeepSpeedConfig(config)
    except Exception as error:  # pydantic's, AssertionError, ValueError, TypeError
        findings.error(where, f"DeepSpeed refuses it: {error}".replace("\n", " "), "correct or remove that key")
        return None
    if loaded.grad_accum_dtype is not None:
        try:
            loaded.grad_accum_dtype = DtypeEnum(loaded.grad_accum_dtype).name  # which has several spellings
        except ValueError:
            message = f"data_types.grad_accum_dtype: {loaded.grad_accum_dtype!r} is unknown to DeepSpeed"
            findings.error(where, message, "fp32, bf16 or fp16")
            return None
    if config.asked.isdisjoint(filled):
        findings.error(
            where,
            "there is no key that DeepSpeed knows",
            "give DeepSpeed's or accelerate's configuration; a model's config.json goes after --model",
        )
        return None
    if not check_batch(where, filled, findings):
        return None
    if "sequence_parallel_size" in filled:  # deepspeed.initialize asks for these, for both or none
        config.asked |= {"sequence_parallel_size", "data_parallel_size"}
    for key in sorted(set(dict.keys(config)) - config.asked):
        close = difflib.get_close_matches(key, config.asked, n=1)
        findings.warning(
            where, f"{key!r} is unknown to DeepSpeed and has no effect", f"did you mean {close[0]!r}?" if close else ""
        )
    zero = _section(filled, "zero_optimization")
    for name, field in type(loaded.zero_config).model_fields.items():
        extra = field.json_schema_extra
        if name in zero and isinstance(extra, dict) and extra.get("deprecated"):
            findings.warning(where, f"zero_optimization.{name} is deprecated", f"use {extra.get('new_param')}")
    return loaded


def _setup(loaded: Any, world_size: int, num_nodes: int) -> Setup:
    zero, stage = loaded.zero_config, int(loaded.zero_optimization_stage)
    engine = _STAGE_NAMES.get(stage, "ddp" if world_size > 1 else "single")
    precision = "bf16" if loaded.bfloat16_config.enabled else "fp16" if loaded.float16_config.enabled else "no"
    offloads = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    if stage == 1 and precision == "bf16" and loaded.grad_accum_dtype == "fp32" and not offloads:
        engine = "zero1 (BF16_Optimizer)"
    buffers = int(zero.reduce_bucket_size) if zero.contiguous_gradients or offloads else 0
    if stage < 3 and zero.overlap_comm:
        buffers *= 2
    return Setup(
        engine=engine,
        world_size=world_size,
        num_nodes=num_nodes,
        shard_size=world_size if stage else 1,
        precision=precision,
        micro_batch_size=loaded.train_micro_batch_size_per_gpu,
        accumulation=loaded.gradient_accumulation_steps,
        offload_optimizer=offloads,
        offload_params=stage == 3 and zero.offload_param is not None and zero.offload_param.device != "none",
        persistence_threshold=int(zero.param_persistence_threshold),
        model_persistence_threshold=int(zero.model_persistence_threshold),
        secondary_size=zero.zero_hpz_partition_size if stage == 3 else 1,
        bucket_elements=buffers if stage else 0,
        max_live_elements=int(zero.max_live_parameters),
        sub_group_elements=int(zero.sub_group_size) if stage == 3 else 0,
        round_robin=is_round_robin(stage, bool(zero.round_robin_gradients)),
        alignment=16 // (4 if precision == "no" else 2) if zero.parameter_alignment and stage in (1, 2) else 1,
        half_gradients=loaded.float16_config.fp16_master_weights_and_grads,
    )
