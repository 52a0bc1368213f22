"""The adapter as PEFT writes and reads it, from and into every engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from reflora_dist.checkpoints.training_state import load_adapter, save_adapter
from tests.support.adapters import VARIANTS, variant_base, variant_model, wrap_variant
from tests.support.checkpoints import as_float, wrapped_workload
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import train_on
from tests.support.workloads import Factors, synthetic_workload, worst_factor_error


def _variant_cases() -> Iterator[Any]:
    default = {
        ("zero3-persist-none", "dora"),
        ("fsdp1-full", "modules-to-save"),
        ("fsdp2", "embedding"),
        ("zero3", "modules-to-save"),
        ("fsdp1-flat", "dora"),
        ("fsdp1-full+tall", "dora"),
        ("fsdp2+tall", "two-adapters"),
        ("zero3+tall", "embedding"),
    }
    names = ("ddp", "fsdp2", "fsdp1-full", "fsdp1-flat", "zero2", "zero3", "zero3-persist-none")
    for name in (*names, *(f"{name}+tall" for name in names)):  # with lora_A stored tall
        for variant in (*VARIANTS, "two-adapters"):
            if name.startswith("fsdp1-flat") and variant in ("embedding", "modules-to-save"):
                continue  # PEFT's wrap policy gives frozen and trained parameters one unit there, torch refuses it
            marks = [] if (name, variant) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, variant, marks=marks, id=f"{name}-{variant}")


@pytest.mark.parametrize(("engine_name", "variant"), _variant_cases())
def test_saved_adapter_is_byte_for_byte_what_peft_writes(engine_name: str, variant: str, tmp_path: Path) -> None:
    """The files of a wrapped model, saved before and after a step, equal those that PEFT writes for the same model
    in one process, and `PeftModel.from_pretrained` computes the same logits from them.
    """
    expected = variant_model(variant)
    expected.save_pretrained(tmp_path / "expected")
    run_ranks(_save_variant, 2, engine_name, variant, str(tmp_path))
    files = sorted(path.relative_to(tmp_path / "expected") for path in (tmp_path / "expected").rglob("adapter_*"))
    assert len(files) == (4 if variant == "two-adapters" else 2)
    for file in files:
        assert _comparable(tmp_path / "before" / file) == _comparable(tmp_path / "expected" / file), file
    assert not list((tmp_path / "before").rglob(".adapter-*"))
    loaded = PeftModel.from_pretrained(variant_base(), tmp_path / "after").eval()
    reference = load_file(tmp_path / "after.safetensors")["logits"]
    with torch.no_grad():
        logits = loaded(input_ids=synthetic_workload(steps=1).batches[0][:2]).logits
    # the distributed forward may use another kernel; a stale or missing parameter moves logits by 1e-2
    assert torch.allclose(logits, reference, atol=1e-5)


def _comparable(file: Path) -> Any:
    """The bytes; of the configuration its content, since PEFT writes sets in the order of their hashes."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = json.loads(file.read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in content.items()}


def _save_variant(rank: int, world_size: int, engine_name: str, variant: str, folder: str) -> None:
    from safetensors.torch import save_file

    workload = synthetic_workload(steps=1)
    wrapped = wrap_variant(engine_name, variant_model(variant), world_size)
    save_adapter(wrapped.model, f"{folder}/before")
    train_on(wrapped, workload.batches[0])
    save_adapter(wrapped.model, f"{folder}/after")
    wrapped.model.eval()
    with torch.no_grad():
        logits: Tensor = wrapped.model(input_ids=workload.batches[0][:2]).logits
    if rank == 0:
        save_file({"logits": logits.contiguous()}, f"{folder}/after.safetensors")


@pytest.mark.parametrize(
    ("engine_name", "bare"),
    [
        ("zero3-persist-none", True),
        ("fsdp1-full", False),
        ("zero3+tall", False),
        *(
            pytest.param(*case, marks=pytest.mark.all_ranks)
            for case in (
                ("single", False),
                ("ddp", True),
                ("fsdp2", False),
                ("fsdp2-hsdp-shard1", False),
                ("fsdp1-flat", False),
                ("zero1-bf16", False),
                ("zero2", True),
                ("zero2-round-robin", False),
                ("zero3", False),
                ("fsdp2+tall", False),
                ("fsdp1-full+tall", False),
                ("zero2+tall", True),
            )
        ),
    ],
)
def test_an_adapter_loaded_into_a_running_engine_is_trained_on(engine_name: str, bare: bool, tmp_path: Path) -> None:
    """After two steps the adapter of before is loaded; a step of learning rate zero leaves it: also the masters
    that the engine updates were replaced, or the step would bring the old factors back.
    """
    world_size = ENGINES[engine_name.partition("+")[0]].world_sizes[0]
    for first, moved, loaded, stepped in run_ranks(_load_again, world_size, engine_name, str(tmp_path / "a"), bare):
        assert worst_factor_error(moved, first) > 1e-3
        assert worst_factor_error(loaded, first) == 0.0
        assert worst_factor_error(stepped, first) == 0.0


def _load_again(rank: int, world_size: int, engine_name: str, folder: str, bare: bool) -> tuple[Factors, ...]:
    workload, wrapped = wrapped_workload(engine_name, world_size)
    model = wrapped.bare if bare else wrapped.model
    save_adapter(model, folder)
    first = as_float(wrapped.factors())
    for batch in workload.batches[:2]:
        train_on(wrapped, batch)
    moved = as_float(wrapped.factors())
    load_adapter(model, wrapped.optimizer, folder)
    loaded = as_float(wrapped.factors())
    for group in wrapped.optimizer.param_groups:
        group["lr"] = 0.0
    train_on(wrapped, workload.batches[2])
    return first, moved, loaded, as_float(wrapped.factors())
