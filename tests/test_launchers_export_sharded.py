"""The adapter of a sharded checkpoint, offline: against the masters that the ranks held when they saved it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from launchers import export
from reflora_dist import attach, initialize_adapters
from reflora_dist.checkpoint import save_checkpoint
from reflora_dist.consolidate import consolidate_adapter, find_state
from tests import test_checkpoint_trainer
from tests.cluster import run_ranks
from tests.engines_under_test import ENGINES
from tests.engines_under_test.common import _train_on
from tests.test_adapter_files import _VARIANTS, _variant_base, _variant_model, _wrap_variant
from tests.test_checkpoint import _config, _convert, _wrap
from tests.workloads import Factors, build_model, synthetic_workload

STEPS = 2


def _masters(engine_name: str, wrapped: Any) -> Factors:
    """Every trained parameter, whole, in the precision in which it is trained."""
    if "bf16" not in engine_name:
        return wrapped.factors()
    from deepspeed.utils import safe_get_full_fp32_param  # right without round_robin_gradients

    model = wrapped.model.module
    return {name: safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def _train(rank: int, world_size: int, engine_name: str, folder: str) -> Factors:
    workload, wrapped = _wrap(engine_name, world_size)
    handle = attach(wrapped.model, wrapped.optimizer, _config("reflora"))
    for batch in workload.batches[:STEPS]:
        _train_on(wrapped, batch)
    save_checkpoint(folder, wrapped.model, wrapped.optimizer, handle)
    return _masters(engine_name, wrapped)


def _assert_exported(folder: Path, masters: Factors) -> None:
    """Bit by bit, and PEFT loads it."""
    exported = load_file(folder / "adapter_model.safetensors")
    assert exported.keys() == {name.replace(".default", "") for name in masters}
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**synthetic_workload(steps=1).llama)), folder)
    parameters = dict(loaded.named_parameters())
    for name, master in masters.items():
        assert exported[name.replace(".default", "")].dtype == master.dtype == torch.float32
        assert torch.equal(exported[name.replace(".default", "")], master), name
        assert torch.equal(parameters[name], master), name


def _cases() -> Iterator[Any]:
    default = {("fsdp2", 2), ("zero2", 2), ("zero3", 3), ("zero2-round-robin", 3)}
    engines = ("ddp", "fsdp2", "fsdp2-shard1", "fsdp1-full", "fsdp1-flat", "zero1", "zero2", "zero2-round-robin")
    engines += ("zero2-two-groups", "zero3", "zero3-two-groups", "zero3-subgroups", "zero3-persist-all")
    engines += ("zero2-bf16-masters", "zero3-bf16-masters")
    for name in engines:
        for world_size in ENGINES[name].world_sizes[:2]:
            marks = [] if (name, world_size) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, world_size, marks=marks, id=f"{name}-{world_size}")


@pytest.mark.parametrize(("engine_name", "world_size"), _cases())
def test_the_adapter_of_a_checkpoint_is_that_of_the_masters(
    engine_name: str, world_size: int, tmp_path: Path
) -> None:
    """From the shards, though another adapter lies beside them: nothing is taken from there."""
    masters = run_ranks(_train, world_size, engine_name, str(tmp_path / "checkpoint"))[0]
    saved = tmp_path / "checkpoint" / "adapter_model.safetensors"
    state = find_state(tmp_path / "checkpoint")
    assert state is not None
    for number, source in enumerate((tmp_path / "checkpoint", state)):
        consolidate_adapter(source, tmp_path / f"adapter{number}")
        _assert_exported(tmp_path / f"adapter{number}", masters)
        saved.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("engine_name", "world_size"),
    [
        ("zero3", 3),
        *(
            pytest.param(name, 2, marks=pytest.mark.all_ranks)
            for name in ("zero1", "zero2", "zero1-bf16", "zero3-two-groups", "zero3-bf16-masters")
        ),
    ],
)
def test_the_adapter_of_a_universal_checkpoint_is_that_of_the_masters(
    engine_name: str, world_size: int, tmp_path: Path
) -> None:
    """What ds_to_universal made; and an error that names the file where one is missing or truncated."""
    masters = run_ranks(_train, world_size, engine_name, str(tmp_path / "checkpoint"))[0]
    _convert(tmp_path / "checkpoint")
    universal = tmp_path / "checkpoint" / "state_universal"
    consolidate_adapter(universal, tmp_path / "adapter")
    _assert_exported(tmp_path / "adapter", masters)
    victim = universal / "zero" / next(iter(masters)) / "fp32.pt"
    victim.write_bytes(victim.read_bytes()[:-200])
    with pytest.raises(ValueError, match="fp32.pt is truncated"):
        consolidate_adapter(universal, tmp_path / "other")
    victim.unlink()
    with pytest.raises(ValueError, match="fp32.pt is missing"):
        consolidate_adapter(universal, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "engine_name", ["fsdp2-trainer", "zero3-trainer", *(pytest.param(n, marks=pytest.mark.all_ranks) for n in ("fsdp1-trainer", "zero2-trainer"))]
)
def test_checkpoints_of_hf_trainer(engine_name: str, tmp_path: Path) -> None:
    """Its own layout; the configuration is found in the folder above the shards too."""
    train = test_checkpoint_trainer._train
    outcome = run_ranks(train, 2, engine_name, "reflora", str(tmp_path / "run"))[0]
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "adapter_model.safetensors").unlink()
    state = find_state(checkpoint)
    assert state is not None and state != checkpoint
    for number, source in enumerate((checkpoint, state)):
        consolidate_adapter(source, tmp_path / f"adapter{number}")
        _assert_exported(tmp_path / f"adapter{number}", outcome.saved[4])


# --- kinds of adapters ---


def _train_variant(rank: int, world_size: int, engine_name: str, variant: str, folder: str) -> None:
    from safetensors.torch import save_file

    from reflora_dist.checkpoint import save_adapter

    workload = synthetic_workload(steps=1)
    wrapped = _wrap_variant(engine_name, _variant_model(variant), world_size)
    handle = attach(wrapped.model, wrapped.optimizer, _config("lora"))
    _train_on(wrapped, workload.batches[0])
    save_checkpoint(f"{folder}/checkpoint", wrapped.model, wrapped.optimizer, handle)
    wrapped.model.eval()
    with torch.no_grad():
        logits = wrapped.model(input_ids=workload.batches[0][:2]).logits
    if rank == 0:
        save_file({"logits": logits.contiguous()}, f"{folder}/logits.safetensors")


def _variant_cases() -> Iterator[Any]:
    default = {("fsdp2", "modules-to-save"), ("zero3", "dora")}
    for engine_name in ("fsdp2", "zero2", "zero3"):
        for variant in (*_VARIANTS, "two-adapters"):
            marks = [] if (engine_name, variant) in default else [pytest.mark.all_ranks]
            yield pytest.param(engine_name, variant, marks=marks, id=f"{engine_name}-{variant}")


@pytest.mark.parametrize(("engine_name", "variant"), _variant_cases())
def test_every_kind_of_adapter_is_named_as_peft_does(engine_name: str, variant: str, tmp_path: Path) -> None:
    """The tensors and names are those that PEFT saves for the same model (fp32: working copies are masters)."""
    run_ranks(_train_variant, 2, engine_name, variant, str(tmp_path))
    consolidate_adapter(tmp_path / "checkpoint", tmp_path / "adapter")
    expected = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], expected[key]) for key in expected)
    loaded = PeftModel.from_pretrained(_variant_base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = loaded(input_ids=synthetic_workload(steps=1).batches[0][:2]).logits
    # the distributed forward may use another kernel; a stale or missing parameter moves logits by 1e-2
    assert torch.allclose(logits, load_file(tmp_path / "logits.safetensors")["logits"], atol=1e-5)


def _train_latent(rank: int, world_size: int, engine_name: str, folder: str) -> Factors:
    """LoRA-XS: of its three factors only R is in the training state."""
    from reflora_dist.lora_sb import initialize_lora_xs

    workload, wrapped = _wrap_model(engine_name, world_size, _latent_model())
    initialize_lora_xs(wrapped.model, wrapped.optimizer)
    _train_on(wrapped, workload.batches[0])
    save_checkpoint(folder, wrapped.model, wrapped.optimizer)
    return {}


def _latent_model() -> nn.Module:
    from peft import get_peft_model

    from reflora_dist.lora_sb import LoraXSConfig

    torch.manual_seed(0)
    return get_peft_model(_variant_base(), LoraXSConfig(r=4, target_modules=["q_proj", "down_proj"])).train()


def _wrap_model(engine_name: str, world_size: int, model: nn.Module) -> Any:
    workload = synthetic_workload(steps=STEPS)
    return workload, ENGINES[engine_name].wrap(model, workload.settings, workload.batches.shape[1] // world_size)
