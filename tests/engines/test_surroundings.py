"""What else happens to an attached model: compiled steps, copies, loading, moves, gathered shards."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import LoRARite, RefLoRAConfig, attach
from reflora_dist.algebra.tall_blocks import BlockSet
from reflora_dist.checkpoints.training_state import load_checkpoint, save_adapter, save_checkpoint
from reflora_dist.export.consolidate import consolidate_adapter
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.small import backward, small_batches, small_model, train_small, trainable
from tests.support.workloads import synthetic_workload

CONFIG = RefLoRAConfig(warmup_steps=0)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def test_a_compiled_step_does_not_trace_into_the_method() -> None:
    """Kernels change gradients by their addresses, which a graph does not see."""
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        traced.extend(str(node.meta.get("stack_trace")) for node in graph.graph.nodes)
        return graph.forward

    expected = small_model()
    optimizer = torch.optim.SGD(trainable(expected), lr=1e-2)
    attach(expected, optimizer, CONFIG)
    train_small(expected, optimizer, small_batches(2))
    model = small_model()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    handle = attach(model, optimizer, CONFIG)
    step = torch.compile(lambda: optimizer.step(), backend=backend)
    for batch in small_batches(2):
        backward(model, batch)
        step()
        optimizer.zero_grad()
    assert traced and not any("reflora_dist/" in trace.replace("\\", "/") for trace in traced)
    assert handle.report().applied_steps == 2
    for one, other in zip(trainable(model), trainable(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def _evaluate_before_the_step(rank: int, world_size: int, method: str) -> str:
    workload = synthetic_workload(steps=1)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**workload.llama)), LoraConfig(**workload.lora))
    fully_shard(model)
    kind = METHOD_OPTIMIZERS.get(method, torch.optim.AdamW)
    optimizer = kind(trainable(model), lr=1e-2)
    attach(model, optimizer, RefLoRAConfig(method=method, warmup_steps=0))
    model(input_ids=workload.batches[0], labels=workload.batches[0]).loss.backward()
    with torch.no_grad():
        model(input_ids=workload.batches[0])
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("method", ["reflora", "lora-rite"])
def test_gathered_factors_are_named(method: str) -> None:
    """torch itself would update whole copies that are dropped."""
    for message in run_ranks(_evaluate_before_the_step, 2, method):
        assert "a forward without gradients ran after backward()" in message and "model.reshard()" in message


def test_r_above_the_layers_sizes(caplog: pytest.LogCaptureFixture) -> None:
    """S exists nowhere, or not in some adapters, which are then named."""
    model = small_model(r=16, lora_alpha=16)
    with pytest.raises(ValueError, match=r"r=16 is above in=10 or out=14 of .*first\.default, and likewise in all"):
        attach(model, _adamw(model), CONFIG)
    attach(model, _adamw(model), RefLoRAConfig(method="scaled-gd"))
    model = small_model(rank_pattern={"second": 10})
    with caplog.at_level(logging.WARNING, "reflora_dist"):
        attach(model, _adamw(model), CONFIG)
    assert "r is above in or out of 1 of 2 adapters (base_model.model.second.default, ...)" in caplog.text


def test_adapters_that_are_switched_off() -> None:
    model = small_model()
    optimizer = _adamw(model)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"is switched off: call enable_adapter_layers\(\)"):
        attach(model, optimizer, CONFIG)


def test_another_scaling_after_attach() -> None:
    """LoRA-Pro's step depends on it."""
    model = small_model()
    optimizer = _adamw(model)
    attach(model, optimizer, RefLoRAConfig(method="lora-pro", warmup_steps=0))
    train_small(model, optimizer, small_batches(1))
    model.base_model.model.first.set_scale("default", 0.25)
    with pytest.raises(RuntimeError, match=r"scaling changed after attach\(\)"):
        optimizer.step()


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = small_model(), small_model(seed=1)


def test_two_models_are_not_saved_as_one(tmp_path: Path) -> None:
    model = _Two()
    with pytest.raises(ValueError, match=r"contains 2 PEFT models \(query, document\)"):
        save_adapter(model, tmp_path)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "state")
    config = tmp_path / "config"
    model.query.save_pretrained(config)
    with pytest.raises(ValueError, match=r"holds several PEFT models \(model.document, model.query\)"):
        consolidate_adapter(tmp_path / "state", tmp_path / "exported", adapter_config=config)


def test_a_frozen_reference_is_not_what_is_saved(tmp_path: Path) -> None:
    model = _Two()
    model.document.requires_grad_(False)
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    factors = [p for name, p in model.query.named_parameters() if "lora_" in name]
    assert len(saved) == len(factors) and all(any(torch.equal(p, q) for q in saved.values()) for p in factors)


def _tied(rank: int, world_size: int, engine_name: str, folder: Path) -> list[str]:
    """The names in the training state of a model whose embedding is the head's."""
    workload = synthetic_workload(steps=1)
    workload.llama["tie_word_embeddings"] = True
    base = LlamaForCausalLM(LlamaConfig(**workload.llama))
    model = get_peft_model(base, LoraConfig(**workload.lora))
    micro_batch_size = workload.batches.shape[1] // world_size
    wrapped = ENGINES[engine_name].wrap(model, workload.settings, micro_batch_size)
    save_checkpoint(folder, wrapped.model, wrapped.optimizer)
    load_checkpoint(folder, wrapped.model, wrapped.optimizer)
    states = sorted(folder.rglob("*model_states.pt"))
    if states:
        return [name for state in states for name in torch.load(state, weights_only=False)["module"]]
    return list(dcp.FileSystemReader(folder / "state").read_metadata().state_dict_metadata)


@pytest.mark.parametrize("engine_name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_a_tied_base_is_not_in_a_checkpoint(engine_name: str, tmp_path: Path) -> None:
    """Under neither of its names."""
    for names in run_ranks(_tied, 2, engine_name, tmp_path / "checkpoint"):
        assert any("lora_A" in name for name in names) and not any("lm_head" in name for name in names)


class _WithValueHead(nn.Module):
    def __init__(self, pretrained_model: PeftModel) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model


def test_an_adapter_inside_another_module_is_exported(tmp_path: Path) -> None:
    model = _WithValueHead(small_model())
    save_checkpoint(tmp_path / "checkpoint", model, _adamw(model))
    consolidate_adapter(tmp_path / "checkpoint", tmp_path / "exported")
    loaded = PeftModel.from_pretrained(small_model(seed=3).unload(), tmp_path / "exported")
    expected = {name: p for name, p in model.pretrained_model.named_parameters() if "lora_" in name}
    found = dict(loaded.named_parameters())
    assert expected and all(torch.equal(found[name].double(), p) for name, p in expected.items())


def test_trained_tokens_are_exported(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    )
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.normal_()
    save_checkpoint(tmp_path / "checkpoint", model, _adamw(model))
    consolidate_adapter(tmp_path / "checkpoint", tmp_path / "exported")
    loaded = PeftModel.from_pretrained(base, tmp_path / "exported")
    tokens = torch.arange(32)[None]
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


def test_a_default_device_leaves_counts_on_the_host() -> None:
    """A step would wait for each of them."""
    model = small_model()
    optimizer = LoRARite(trainable(model))
    with torch.device("meta"):
        optimizer.create_state()
    assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())


def test_blocks_of_several_dtypes_are_each_rounded_to_their_own() -> None:
    blocks = BlockSet([], [], torch.device("cpu"))
    blocks.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]  # where one kernel may round them all
    product = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stored = [torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 4)]
    blocks._store(product, stored)
    assert torch.equal(stored[0], product[0].bfloat16()) and torch.equal(stored[1], product[1].float())
