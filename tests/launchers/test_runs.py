"""finetune.py from the command line's options to the adapter on disk, on micro models, under every engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from reflora_dist import convert_adapter
from tests.support.finetune import HSDP_WORLD_SIZE, WORLD_SIZE, finetuned
from tests.support.launchers import REPOSITORY, micro_model, write_records

_SAMPLED = {("scaled-gd", "fsdp2"), ("lora-pro", "zero3"), ("lora-rite", "fsdp1")}
_SAMPLED |= {("lora-muon", "zero2")}
_SAMPLED |= {("lora-sb", "zero3"), ("lora-sb", "fsdp2"), ("lora-xs", "fsdp1")}
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_hpz", "zero3_fp16", "zero3_offload", "fsdp1", "fsdp2", "fsdp2_hsdp")


def _engine_run(folder: Path, engine: str) -> dict[str, Any]:
    """The run with that engine's shipped configuration, once for all tests."""
    metrics = folder / f"engine-{engine}" / "metrics.json"
    return json.loads(metrics.read_text()) if metrics.exists() else finetuned(folder, metrics.parent.name, engine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    micro_model(folder / "model")
    micro_model(folder / "fast_model", kind="fast")
    write_records(folder / "records.jsonl")
    return folder


@pytest.mark.parametrize(
    "engine",
    # DeepSpeed compiles its CPU Adam for one of them
    [pytest.param(name, marks=pytest.mark.all_ranks) if name == "zero3_offload" else name for name in ENGINES],
)
def test_every_shipped_configuration_trains_and_saves_the_adapter(folder: Path, engine: str) -> None:
    output = f"engine-{engine}"
    metrics = _engine_run(folder, engine)
    report = metrics["report"]
    assert engine.split("_")[0] in report["engine"]
    world_size = HSDP_WORLD_SIZE if engine == "fsdp2_hsdp" else WORLD_SIZE
    assert (metrics["world_size"], report["steps"], report["num_pairs"]) == (world_size, 6, 14)
    assert report["applied_steps"] == 4
    assert (metrics["bytes_per_step"] == 0) == (engine == "ddp")
    # nobody asked for it: sharded adapters are stored tall, and nothing but Grams and cut rows is sent
    assert report["layout"] == ("whole" if engine == "ddp" else "tall")
    assert "all_to_all" not in report["collectives_per_step"]
    held_out = metrics["held_out_loss"]
    assert [point["step"] for point in held_out] == [0, 3, 6]
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert len(metrics["train_loss"]) == 6
    assert metrics["peak_memory_bytes"] > 2**26
    for plot in ("loss.png", "method.png"):
        assert (folder / output / plot).read_bytes().startswith(b"\x89PNG")
    _check_adapter(folder, folder / output)


def test_an_adapter_is_saved_after_an_evaluation_that_gathered_ahead(folder: Path) -> None:
    """As for models of real size, no factor is small enough for ZeRO-3 to stay whole. A backward would use the rest."""
    config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2000}
    config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    (folder / "ahead.json").write_text(json.dumps(config))
    changes = {"deepspeed": folder / "ahead.json", "save_strategy": "steps", "save_steps": 3}
    metrics = finetuned(folder, "ahead", "zero3", **changes)
    assert [point["step"] for point in metrics["held_out_loss"]] == [0, 3, 6]
    _check_adapter(folder, folder / "ahead")
    first, last = (load_file(folder / "ahead" / part / "adapter_model.safetensors") for part in ("checkpoint-3", ""))
    assert not any(torch.equal(first[name], last[name]) for name in last)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_adapters_stay_flat_if_asked_for(folder: Path, engine: str) -> None:
    """The same training, but for the order of sums in the forward; more is sent."""
    metrics, tall = finetuned(folder, f"flat-{engine}", engine, tall_adapters=False), _engine_run(folder, engine)
    assert metrics["report"]["layout"] == "flat"
    assert metrics["report"]["collectives_per_step"] == {"all_to_all": 2, "all_reduce": 1}
    assert metrics["bytes_per_step"] > tall["bytes_per_step"]
    losses = [point["loss"] for run in (metrics, tall) for point in run["held_out_loss"]]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    _check_adapter(folder, folder / f"flat-{engine}")


@pytest.mark.parametrize(
    "method, engine",
    [
        pytest.param(method, engine, marks=[] if (method, engine) in _SAMPLED else [pytest.mark.all_ranks])
        for method in ("scaled-gd", "lora-pro", "balora", "lora-rite", "lora-muon", "lora-sb", "lora-xs")
        for engine in ENGINES
    ],
)
def test_every_method_trains_under_every_engine(folder: Path, method: str, engine: str) -> None:
    """The same options, data and start: only the method differs, and it is the one asked for."""
    options: dict[str, Any] = {"method": method, "reflora_warmup_steps": int(method in ("lora-pro", "balora"))}
    if method == "balora":
        options["carry_moments"] = True
    if method == "lora-rite":
        options |= {"learning_rate": 3e-2, "optim_args": "update_capping=2.0"}
    if method == "lora-muon":
        options |= {"learning_rate": 1e-1, "optim_args": "momentum=0.8"}
    if method in ("lora-rite", "lora-muon") and engine == "zero3_offload":
        _refused_beside_another_optimizer(folder, options)
        options["deepspeed"] = folder / "zero3_offload_own_optimizer.json"
        config = json.loads((REPOSITORY / "ds_configs" / "zero3_offload.json").read_text())
        del config["optimizer"]
        options["deepspeed"].write_text(json.dumps({**config, "zero_force_ds_cpu_optimizer": False}))
    latent = method in ("lora-sb", "lora-xs")
    if latent:
        options |= {"reflora_warmup_steps": None}
        options |= {"lora_alpha": 4, "learning_rate": 1e-2 if method == "lora-sb" else 1e-1, "lora_sb_batches": 2}
        options |= {"warmup_steps": 2, "lr_scheduler_type": "linear"}
    metrics = finetuned(folder, f"{method}-{engine}", engine, **options)
    assert metrics["report"]["method"] == method
    assert engine.split("_")[0] in metrics["report"]["engine"]
    assert metrics["report"]["num_pairs"] == 14
    plain_steps = 0 if method == "balora" else options["reflora_warmup_steps"] or 0  # balora acts after its last one
    assert metrics["report"]["applied_steps"] == 6 - plain_steps
    held_out = [point["loss"] for point in metrics["held_out_loss"]]
    assert held_out[-1] < held_out[0]
    reference = _engine_run(folder, engine)["held_out_loss"]
    assert held_out[-1] != reference[-1]["loss"]
    if latent:
        _check_latent_adapter(folder, folder / f"{method}-{engine}")
    else:
        _check_adapter(folder, folder / f"{method}-{engine}")


def _check_latent_adapter(folder: Path, adapter: Path) -> None:
    """PEFT loads it, and its conversion to plain LoRA computes the same."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 3 * 14 and all(tensor.abs().sum() > 0 for tensor in tensors.values())
    convert_adapter(adapter, adapter / "plain")
    tokens = torch.arange(12)[None]
    logits = []
    for saved in (adapter, adapter / "plain"):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        logits.append(PeftModel.from_pretrained(base, saved)(tokens).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def _refused_beside_another_optimizer(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="has an optimizer of its own"):
        finetuned(folder, "refused", "zero3_offload", **options)


def _check_adapter(folder: Path, adapter: Path) -> None:
    """PEFT loads it on the base, every tensor was trained, and it is small: the base is not in it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 28 and all("lora_" in name for name in tensors)
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    loaded = {n: p for n, p in PeftModel.from_pretrained(base, adapter).named_parameters() if "lora_" in n}
    for name, tensor in tensors.items():
        stored = name.replace(".weight", ".default.weight")
        torch.testing.assert_close(loaded[stored].detach(), tensor.float(), rtol=0, atol=0)


def test_the_engines_agree(folder: Path, request: pytest.FixtureRequest) -> None:
    """The same seed and data give the same losses on every engine, and LoRA's are not RefLoRA's."""
    left_out = () if request.config.getoption("--all-ranks") else ("zero3_offload",)
    engines = [engine for engine in ENGINES if engine not in left_out]
    losses = {e: [point["loss"] for point in _engine_run(folder, e)["train_loss"]] for e in engines}
    plain = [p["loss"] for p in finetuned(folder, "plain", "ddp", method="lora")["train_loss"]]
    for engine in engines:
        # fp32 sums in another order, amplified by Adam over six steps; weights of 10 bits
        assert losses[engine] == pytest.approx(losses["ddp"], rel=5e-3 if engine == "zero3_fp16" else 1e-3), engine
    assert plain[:3] == pytest.approx(losses["ddp"][:3], rel=1e-5)
    assert plain[-1] != pytest.approx(losses["ddp"][-1], rel=1e-3)


def _quantized_run(folder: Path, engine: str, bf16: bool) -> list[float]:
    """Training losses of the run on a 4-bit base, once for all tests."""
    output = f"4bit-{engine}-{bf16}"
    metrics = folder / output / "metrics.json"
    found = json.loads(metrics.read_text()) if metrics.exists() else None
    found = found or finetuned(folder, output, engine, load_in_4bit=True, bf16=bf16)
    assert engine in found["report"]["engine"] and found["report"]["applied_steps"] == 4
    return [point["loss"] for point in found["train_loss"]]


@pytest.mark.parametrize(
    ("engine", "bf16"),
    [
        pytest.param(engine, bf16, marks=[] if (engine, bf16) == ("fsdp2", True) else [pytest.mark.all_ranks])
        for engine in ("zero2", "zero3", "fsdp1", "fsdp2")
        for bf16 in (False, True)
    ],
)
def test_a_4_bit_base_trains_alike_under_every_engine(folder: Path, engine: str, bf16: bool) -> None:
    """As DDP trains on it, evaluations in between; without bf16 also not as on the base itself, by little at first."""
    losses, expected = _quantized_run(folder, engine, bf16), _quantized_run(folder, "ddp", bf16)
    # as above; bf16 rounds each of them
    assert losses == pytest.approx(expected, rel=5e-3 if bf16 else 1e-3)
    first = _engine_run(folder, "ddp")["train_loss"][0]["loss"]
    assert bf16 or expected[0] != pytest.approx(first, rel=3e-5)
    _check_adapter(folder, folder / f"4bit-{engine}-{bf16}")


@pytest.mark.parametrize(
    ("engine", "load_in_4bit"),
    [
        *((engine, False) for engine in ("zero3", "fsdp2")),
        *(pytest.param(engine, False, marks=pytest.mark.all_ranks) for engine in ("ddp", "zero2", "zero3_hpz")),
        *(pytest.param(engine, True, marks=pytest.mark.all_ranks) for engine in ("ddp", "zero2", "zero3", "fsdp2")),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(folder: Path, engine: str, load_in_4bit: bool) -> None:
    names = [f"{name}-{engine}{'-4bit' if load_in_4bit else ''}" for name in ("whole", "resumed")]
    base = {"load_in_4bit": load_in_4bit}
    whole = finetuned(folder, names[0], engine, save_strategy="steps", save_steps=3, **base)
    resumed = finetuned(folder, names[1], engine, resume_from_checkpoint=folder / names[0] / "checkpoint-3", **base)
    assert resumed["report"]["applied_steps"] == whole["report"]["applied_steps"]
    for losses in ("train_loss", "held_out_loss"):  # the evaluation before the first step is not repeated
        assert resumed[losses] == whole[losses]
    assert (whole["settings_changed"], resumed["settings_changed"]) == ([], [])
    tensors = [load_file(folder / name / "adapter_model.safetensors") for name in names]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=0, atol=0)


def test_auto_resumes_from_the_last_checkpoint_or_begins(folder: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "resume_from_checkpoint": "auto"}
    first = finetuned(folder, "auto", "ddp", **settings, max_steps=3, lr_scheduler_type="constant")
    assert [point["step"] for point in first["train_loss"]] == [1, 2, 3]
    second = finetuned(folder, "auto", "ddp", **settings, lr_scheduler_type="constant")
    assert [point["step"] for point in second["train_loss"]] == [1, 2, 3, 4, 5, 6]
    assert second["train_loss"][:3] == first["train_loss"]
    assert second["settings_changed"] == [{"step": 3, "max_steps": [3, 6]}]


# transformers 5.17 knows only the older name, later versions deprecate it
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True},
        {"bf16": True},
        {_CHECKPOINTING: True},
        {"gradient_accumulation_steps": 2},
        {"method": "reflora-s"},
        {"dora": True},
        {"report_to": "tensorboard"},
        *(
            pytest.param(changes, marks=pytest.mark.all_ranks)
            for changes in (
                {"train_on_prompt": True},
                {"rslora": True},
                {"lora_dropout": 0.1},
                {"target_modules": "q_proj"},
            )
        ),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_train_under_zero3(folder: Path, changes: dict[str, Any]) -> None:
    output = f"option-{next(iter(changes))}"
    metrics = finetuned(folder, output, "zero3", max_steps=4, **changes)
    losses = [point["loss"] for point in metrics["train_loss"]]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    assert metrics["report"]["applied_steps"] >= 2
    assert load_file(folder / output / "adapter_model.safetensors")


def test_a_fast_tokenizer_trains_as_well(folder: Path) -> None:
    metrics = finetuned(folder, "fast", "zero3", model=folder / "fast_model", max_steps=4)
    assert metrics["held_out_loss"][-1]["loss"] > 0
