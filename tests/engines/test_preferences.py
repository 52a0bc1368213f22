"""TRL's DPOTrainer and GRPOTrainer with the callback: the method acts, the reference stays, checkpoints go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from reflora_dist import RefLoRACallback, RefLoRAConfig, initialize_adapters
from tests.support.cluster import run_ranks
from tests.support.engines_under_test.accelerated import forget_accelerate, fsdp_on_cpu, prepare_deepspeed_on_cpu
from tests.support.engines_under_test.zero import zero_config
from tests.support.launchers import micro_model
from tests.support.workloads import Settings

GLOBAL_BATCH = 4
STEPS = 4
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
PROMPTS = [f"Count to {number}:" for number in range(8)]
PAIRS = [{"prompt": p, "chosen": f" one, two, {i}", "rejected": " I do not count"} for i, p in enumerate(PROMPTS)]


def further(*engines: str) -> list[Any]:
    return [pytest.param(engine, marks=pytest.mark.all_ranks) for engine in engines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_model(tmp_path_factory.mktemp("preferences"), "fast")


def _arguments(engine: str, world_size: int, folder: Path, **changes: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"use_cpu": True}
    if engine.startswith("zero"):
        prepare_deepspeed_on_cpu()
        config = zero_config(Settings(), GLOBAL_BATCH // world_size, int(engine[4]))
        own = {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}
    elif engine == "fsdp2":
        own |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **own,
        **changes,
    }


def _share_of_vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 8 for text in completions]


def _trainer(
    kind: str, engine: str, method: str, world_size: int, base: Path, output: Path, given: str, **changes: Any
) -> tuple[Any, RefLoRACallback]:
    forget_accelerate()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    if given == "model":
        model = get_peft_model(model, LORA)
    callback = RefLoRACallback(RefLoRAConfig(method=method, warmup_steps=1))
    common = {
        "model": model,
        "processing_class": tokenizer,
        "callbacks": [callback],
        "peft_config": LORA if given == "config" else None,
    }
    arguments = _arguments(engine, world_size, output, **changes)
    with fsdp_on_cpu():
        if kind == "dpo":
            config: Any = DPOConfig(**arguments, max_length=48, train_sampling_strategy="sequential")
            return DPOTrainer(args=config, train_dataset=Dataset.from_list(PAIRS), **common), callback
        config = GRPOConfig(**arguments, num_generations=GLOBAL_BATCH, max_completion_length=8, beta=0.04)
        data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
        return GRPOTrainer(args=config, reward_funcs=_share_of_vowels, train_dataset=data, **common), callback


def _train(
    rank: int, world_size: int, kind: str, engine: str, method: str, base: Path, output: Path, given: str = "config"
) -> dict[str, Any]:
    trainer, callback = _trainer(kind, engine, method, world_size, base, output, given)
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    return {
        "report": callback.report().as_dict(),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def _run(kind: str, engine: str, method: str, base: Path, output: Path, given: str = "config") -> dict[str, Any]:
    if engine == "single":
        (found,) = run_ranks(_train, 1, kind, engine, method, base, output, given, init_process_group=False)
        return found
    return run_ranks(_train, 2, kind, engine, method, base, output, given)[0]


def _factors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (difference / sum(float(value.square().sum()) for value in one.values())) ** 0.5


@pytest.fixture(scope="module")
def one_process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The factors after DPO in one process, by method."""
    found = {}
    for method in ("lora", "reflora"):
        output = tmp_path_factory.mktemp(method)
        _run("dpo", "single", method, folder, output)
        found[method] = _factors(output)
    return found


@pytest.mark.parametrize("engine", ["zero3", "fsdp2", *further("ddp", "zero2")])
def test_dpo_is_that_of_one_process(
    engine: str, folder: Path, one_process: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    found = _run("dpo", engine, "reflora", folder, tmp_path)
    assert found["report"]["applied_steps"] == STEPS - 1 and found["report"]["engine"].startswith(engine)
    acted = _distance(one_process["lora"], one_process["reflora"])
    assert acted > 1e-2
    assert (
        _distance(_factors(tmp_path), one_process["reflora"]) < 0.1 * acted
    )  # Adam enlarges rounding where a gradient is near zero
    assert all("reflora/step_ms" in entry for entry in found["log"][1:])
    # the first step's policy is the reference: log 2 is DPO's loss where both are the same model
    assert found["log"][0]["loss"] == pytest.approx(0.693147, abs=1e-3)


@pytest.mark.parametrize("engine", ["zero3", *further("single", "zero2", "fsdp2")])
def test_grpo_generates_with_the_trained_adapter(engine: str, folder: Path, tmp_path: Path) -> None:
    found = _run("grpo", engine, "reflora", folder, tmp_path)
    assert found["report"]["applied_steps"] == STEPS - 1
    assert any("reflora/balance_median" in entry for entry in found["log"])
    # the divergence from the reference grows from zero: it is measured on the policy's own completions
    divergences = [entry["kl"] for entry in found["log"]]
    assert abs(divergences[0]) < 1e-4 < max(divergences)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert any(float(p.abs().sum()) > 0 for name, p in reloaded.named_parameters() if "lora_B" in name)


def test_the_saved_configuration_has_only_pefts_fields(folder: Path, tmp_path: Path) -> None:
    """A rollout server reads it."""
    _run("dpo", "zero3", "reflora", folder, tmp_path)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LORA).save_pretrained(tmp_path / "pefts")
    ours, pefts = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "pefts"))
    assert ours.keys() == pefts.keys()


def _resumed(rank: int, world_size: int, engine: str, base: Path, output: Path) -> None:
    for name, steps, resume in (("whole", STEPS, False), ("parts", 2, False), ("parts", STEPS, True)):
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2} if name == "parts" else {}
        trainer, _ = _trainer(
            "dpo", engine, "reflora", world_size, base, output / name, "config", **saving, max_steps=steps
        )
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model(str(output / name / "adapter"))


@pytest.mark.parametrize("engine", ["fsdp2", *further("zero2", "zero3")])
def test_dpo_resumes(engine: str, folder: Path, tmp_path: Path) -> None:
    run_ranks(_resumed, 2, engine, folder, tmp_path)
    assert _distance(_factors(tmp_path / "parts"), _factors(tmp_path / "whole")) < 1e-5


def _with_a_changed_base(rank: int, world_size: int, kind: str, base: Path, output: Path) -> str:
    trainer, _ = _trainer(kind, "single", "reflora", world_size, base, output, "config")
    initialize_adapters(trainer.model, "kaiming_both")
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_reference_without_its_adapter_is_refused_where_the_start_changed_the_base(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    (message,) = run_ranks(_with_a_changed_base, 1, kind, folder, tmp_path, init_process_group=False)
    assert "the reference model is the base without its adapter" in message and "kaiming_both" in message
