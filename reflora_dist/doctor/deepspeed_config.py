"""Check of the configuration that DeepSpeed's engine received: its effects, and conflicts with a method."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

from ..checkpoints.deepspeed_universal import is_round_robin
from .deepspeed_optimizer import check_optimizer, count_moments
from .deepspeed_zero import check_zero
from .findings import Findings
from .options import DoctorOptions
from .setup import Setup

_STAGE_NAMES = {1: "zero1", 2: "zero2", 3: "zero3"}


class _Asked(dict):
    """A dictionary that records the keys that are read: a key that a library never reads has no effect."""

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


def knows_any(config: dict[str, Any]) -> bool:
    """Return whether DeepSpeed reads any key of a configuration, even if it then refuses the value."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = _Asked(config)
    with contextlib.suppress(Exception):
        DeepSpeedConfig(asked)
    return not asked.asked.isdisjoint(config)


def judge(
    where: str, filled: dict[str, Any], options: DoctorOptions, size: tuple[int, int], findings: Findings
) -> Setup:
    """Return DeepSpeed's setup, and find settings that it accepts but the method or the run cannot use.

    Args:
        where: the file, for findings.
        filled: its contents as DeepSpeed's engine received them, with "auto" filled in.
        options: the doctor's options.
        size: numbers of ranks and machines.
        findings: receives the problems.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    config = _Asked(filled)
    loaded = DeepSpeedConfig(config)
    _check_names(where, filled, config.asked, findings)
    check_zero(where, filled, loaded, size, findings)
    check_optimizer(where, filled, loaded, options, findings)
    if "gradient_clipping" not in filled:
        findings.warning(
            where,
            f"gradient_clipping is absent, which does not turn it off: DeepSpeed clips at {loaded.gradient_clipping}",
            'set it to a number, 0 for none, or "auto"',
        )
    world_size, num_nodes = size
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


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries: ``("a.b", 1)`` for ``{"a": {"b": 1}}``. A list is one leaf."""
    if not isinstance(config, dict):
        yield path, config
        return
    for key, value in config.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def _check_names(where: str, filled: dict[str, Any], asked: set[str], findings: Findings) -> None:
    """Warn of keys that DeepSpeed never reads."""
    if "sequence_parallel_size" in filled:  # deepspeed.initialize reads both of these or neither
        asked |= {"sequence_parallel_size", "data_parallel_size"}
    for key in sorted(set(filled) - asked):
        close = difflib.get_close_matches(key, asked, n=1)
        findings.warning(
            where, f"{key!r} is unknown to DeepSpeed and has no effect", f"did you mean {close[0]!r}?" if close else ""
        )


def _setup(loaded: Any, world_size: int, num_nodes: int) -> Setup:
    from deepspeed.runtime.config import DtypeEnum

    zero, stage = loaded.zero_config, int(loaded.zero_optimization_stage)
    engine = _STAGE_NAMES.get(stage, "ddp" if world_size > 1 else "single")
    precision = "bf16" if loaded.bfloat16_config.enabled else "fp16" if loaded.float16_config.enabled else "no"
    offloads = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    in_fp32 = loaded.grad_accum_dtype is not None and DtypeEnum(loaded.grad_accum_dtype) is DtypeEnum.fp32
    if stage == 1 and precision == "bf16" and in_fp32 and not offloads:
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
