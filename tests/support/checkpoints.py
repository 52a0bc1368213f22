"""Training to be saved and resumed under every raw engine, and what checkpoints may hold."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from reflora_dist import RefLoRAConfig, tall_adapters
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import Wrapped
from tests.support.engines_under_test.zero import _zero
from tests.support.workloads import (
    Factors,
    Workload,
    build_model,
    synthetic_workload,
    with_method,
)

SAVED_AT, STEPS = 3, 5
SCHEDULE: dict[str, Any] = {"warmup_steps": 1, "interval": 2}


def wrapped_workload(
    engine_name: str, world_size: int, universal: bool = False, method: str = "reflora"
) -> tuple[Workload, Wrapped]:
    workload = synthetic_workload(steps=STEPS)
    engine_name, _, tall = engine_name.partition("+")
    engine = ENGINES[engine_name]
    options = {"apply_escape": True} if method == "lora-rite" else {}
    settings = with_method(dataclasses.replace(workload.settings, clip=0.5), method, **options)
    model = build_model(workload, dtype=engine.model_dtype)
    if tall:
        assert tall_adapters(model) == len(workload.initial_factors) // 2
    wrap = engine.wrap
    if universal:
        assert isinstance(wrap, functools.partial) and wrap.func is _zero
        more = {**wrap.keywords.get("more", {}), "checkpoint": {"load_universal": True}}
        wrap = functools.partial(wrap, more=more)
    return workload, wrap(model, settings, workload.batches.shape[1] // world_size)


def method_config(method: str) -> RefLoRAConfig:
    return RefLoRAConfig(method=method, **({} if method in METHOD_OPTIMIZERS else SCHEDULE))


def assert_no_frozen_base(folder: Path) -> None:
    """No file under the folder holds the first values of any random base weight, in fp32 or bf16.

    safetensors, torch.save and DCP all store tensors uncompressed, so the bytes would be found.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            held = [name for name, forms in _base_bytes().items() if any(form in content for form in forms)]
            assert not held, f"{path} holds {held}"


@functools.lru_cache
def _base_bytes() -> dict[str, tuple[bytes, bytes]]:
    weights = synthetic_workload(steps=1).base_weights
    samples = {name: weight.flatten()[:16].contiguous() for name, weight in weights.items() if "norm" not in name}
    return {
        name: (sample.numpy().tobytes(), sample.bfloat16().view(torch.int16).numpy().tobytes())
        for name, sample in samples.items()
    }


def convert_to_universal(folder: Path) -> None:
    """``python -m deepspeed.checkpoint.ds_to_universal``, in a process that has imported DeepSpeed already."""
    run_ranks(_convert, 1, str(folder), init_process_group=False)


def _convert(rank: int, world_size: int, folder: str) -> None:
    options = ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    folders = ["--input_folder", f"{folder}/state", "--output_folder", f"{folder}/state_universal"]
    sys.argv = ["ds_to_universal", *options, *folders]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def as_float(factors: Factors) -> Factors:
    return {name: factor.float() for name, factor in factors.items()}
