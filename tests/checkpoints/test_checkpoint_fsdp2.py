"""FSDP2's root keeps whole parameters after an evaluation; its shards are saved and loaded all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoints.training_state import load_adapter, save_checkpoint
from tests.support.cluster import run_ranks
from tests.support.workloads import synthetic_workload


def _evaluate_and_save(rank: int, world_size: int, folder: Path, targets: list[str]) -> bool:
    workload = synthetic_workload(steps=1)
    workload.lora["target_modules"] = targets
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**workload.llama)), LoraConfig(**workload.lora))
    fully_shard(model)  # the root's own parameters, of which FSDP2 keeps whole ones until a backward
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = attach(model, optimizer, RefLoRAConfig(warmup_steps=0))
    tokens = workload.batches[0]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    def evaluated() -> Any:
        with torch.no_grad():
            return model(input_ids=tokens, labels=tokens).loss

    before = evaluated()
    save_checkpoint(folder, model, optimizer, handle)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert evaluated() != before
    load_adapter(model, optimizer, folder)
    handle.detach()
    attach(model, optimizer, RefLoRAConfig(warmup_steps=0))
    return bool(evaluated() == before)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["q_proj", "lm_head"])
def test_fsdp2_saves_and_loads_after_an_evaluation(targets: list[str], tmp_path: Path) -> None:
    assert run_ranks(_evaluate_and_save, 2, tmp_path / "checkpoint", targets) == [True, True]
