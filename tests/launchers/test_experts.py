"""Models with stacked experts from training to merging: Mixtral and Qwen3-MoE, and gpt-oss, whose order is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.export.merge import merge_adapter
from tests.support.architectures import saved_architecture
from tests.support.doctor import found as found_in
from tests.support.finetune import finetuned
from tests.support.launchers import REPOSITORY, write_records

TARGETS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {
        "target_modules": "q_proj",
        "target_parameters": "mlp.experts.gate_up_proj",
    },
}
EXPERTS = 4
TOKENS = torch.arange(20)[None]


@pytest.fixture(
    scope="module",
    params=["mixtral", *(pytest.param(name, marks=pytest.mark.all_ranks) for name in ("qwen3_moe", "gpt_oss"))],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named as the architecture."""
    folder = tmp_path_factory.mktemp("experts") / request.param
    saved_architecture(request.param, folder / "model", std=0.1)
    write_records(folder / "records.jsonl")
    return folder


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def _loaded(folder: Path, adapter: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / adapter)


@pytest.mark.timeout(600)
def test_engines_agree_and_the_adapter_is_pefts(folder: Path) -> None:
    common = {**TARGETS[folder.name], "learning_rate": 1e-3, "max_steps": 4, "reflora_warmup_steps": 1}
    metrics = {engine: finetuned(folder, engine, engine, **common) for engine in ("ddp", "fsdp2", "zero3")}
    assert metrics["ddp"]["report"]["num_pairs"] > 2 * EXPERTS
    targets = {name: [value] for name, value in TARGETS[folder.name].items()}
    for engine, config in (("fsdp2", "launchers/accelerate/fsdp2.yaml"), ("zero3", "ds_configs/zero3.json")):
        options = DoctorOptions(model=str(folder / "model"), world_size=2, lora_r=4, mixed_precision="no", **targets)
        diagnosis = diagnose([str(REPOSITORY / config)], options, torch.device("cpu"))
        assert diagnosis.sent_bytes == metrics[engine]["report"]["bytes_per_step"], diagnosis.findings
    for engine, found in metrics.items():
        report = found["report"]
        assert (report["num_pairs"], report["applied_steps"]) == (metrics["ddp"]["report"]["num_pairs"], 3)
        assert report["layout"] == ("whole" if engine == "ddp" else "tall")
    options = DoctorOptions(model=str(folder / "model"), world_size=2, lora_r=4, **targets)
    refused = diagnose([str(REPOSITORY / "launchers/accelerate/fsdp1.yaml")], options, torch.device("cpu"))
    assert found_in(refused, "error", "adapts a parameter")
    logits = {engine: _logits(_loaded(folder, engine)) for engine in metrics}
    plain = finetuned(folder, "lora", "ddp", method="lora", **{**common, "reflora_warmup_steps": None})
    assert plain["method"] == "lora"
    moved = (_logits(_loaded(folder, "lora")) - logits["ddp"]).norm()
    for engine in ("fsdp2", "zero3"):
        assert (logits[engine] - logits["ddp"]).norm() < 1e-2 * moved, engine
    merge_adapter(folder / "zero3", folder / "merged")
    expected = _loaded(folder, "zero3").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    weights = merged.state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weights[name], weight), name
