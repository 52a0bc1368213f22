"""The model is asked whether examples are the same in a batch: packed behind others, and padded on the left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from launchers import evaluate, finetune
from launchers.data.tokenization import Collator, pack
from launchers.training.batching import (
    BatchingChangesExamples,
    require_position_ids,
    require_same_in_batch,
    require_separate_examples,
)
from tests.support.architectures import saved_architecture, small_architecture
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import write_questions, write_records

APART = ("llama", "mistral", "gemma3", "qwen2_moe", "mixtral", "phi", "phi3", "gpt2", "gpt_neo")
TOGETHER = ("opt", "falcon", "falcon_h1", "lfm2", "recurrent_gemma")
WITHOUT_POSITIONS = ("bloom", "mpt", "mamba", "rwkv")
TOKENS = [40, 71, 99, 3, 150, 200, 9, 30, 77]
COLLATOR = Collator(pad_token_id=0)


def _ask(model: Any, *, batch_size: int = 2, use_cache: bool = False) -> None:
    model.config.use_cache = use_cache
    arguments = SimpleNamespace(per_device_train_batch_size=batch_size, use_cache=use_cache, device=torch.device("cpu"))
    require_separate_examples(model, arguments, COLLATOR, TOKENS)


@torch.no_grad()
def _sees_others(model: Any) -> bool:
    """Whether an example of a packed row has other logits than alone, by more than the order of fp32 sums."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 350, (length,), generator=generator).tolist() for length in (12, 9, 6, 5)]
    examples = [{"input_ids": ids, "labels": ids} for ids in tokens]
    (row,) = pack(examples, 32)
    packed = model(**COLLATOR([row]), use_cache=False).logits[0].split([12, 9, 6, 5])
    alone = model(**COLLATOR(examples), use_cache=False).logits
    changes = [(one - other[: len(one)]).norm() / one.norm() for one, other in zip(packed, alone, strict=True)]
    return max(changes).item() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("std", [None, 0.3], ids=["start", "wide"])
@pytest.mark.parametrize("name", [*APART, *TOGETHER])
def test_models_pass_whose_packed_examples_have_the_logits_of_lone_ones(
    name: str, std: float | None, dtype: torch.dtype
) -> None:
    model = small_architecture(name, std).float()
    assert _sees_others(model) == (name in TOGETHER)
    model.to(dtype)
    if name in APART:
        _ask(model)
        _ask(model, batch_size=1)
        return
    for batch_size in (1, 2):
        with pytest.raises(BatchingChangesExamples, match=r"^packing=True.*see each other.*; drop --packing$"):
            _ask(model, batch_size=batch_size)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_cache_is_refused(name: str) -> None:
    with pytest.raises(BatchingChangesExamples, match="set --use_cache False, or drop --packing"):
        _ask(small_architecture(name), use_cache=True)


@pytest.mark.parametrize("name", WITHOUT_POSITIONS)
def test_models_that_take_no_positions_are_refused(name: str) -> None:
    with pytest.raises(BatchingChangesExamples, match=r"takes no position_ids.*drop --packing"):
        require_position_ids(small_architecture(name))
    require_position_ids(small_architecture("llama"))


def test_attention_that_takes_only_single_rows_apart_is_asked_with_the_batch_size_of_the_run() -> None:
    """As for flash attention, for which transformers takes packed examples apart where a batch is one row."""

    def mask(batch_size: int, **arguments: Any) -> Tensor | None:
        return sdpa_mask(batch_size=batch_size, **arguments) if batch_size == 1 else None

    AttentionInterface.register("one_row", sdpa_attention_forward)
    AttentionMaskInterface.register("one_row", mask)
    model = small_architecture("llama")
    model.set_attn_implementation("one_row")
    _ask(model, batch_size=1)
    remedy = "set --per_device_train_batch_size 1 or --attn_implementation sdpa, or drop --packing"
    with pytest.raises(BatchingChangesExamples, match=remedy):
        _ask(model, batch_size=2)


def test_asking_leaves_no_trace() -> None:
    """Random numbers, training mode and gradients are those of before, with dropout in the model and the adapter."""
    model = get_peft_model(
        small_architecture("gpt2"),
        LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _ask(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and model.base_model.model.transformer.h[0].attn.resid_dropout.training
    assert all(parameter.grad is None for parameter in model.parameters())


def _ending(rank: int, world_size: int, engine: str, argv: list[str]) -> str:
    """What a rank of finetune.py ends with; nothing if all went well."""
    try:
        finetune_rank(rank, world_size, engine, argv)
    except SystemExit as end:
        return str(end.code)
    return ""


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.all_ranks) for e in ("zero3", "fsdp1"))]
)
def test_sharded_models_are_asked_on_all_ranks(tmp_path: Path, engine: str, name: str) -> None:
    """OPT is refused in one line on every rank, before the first step; LLaMA trains."""
    saved_architecture(name, tmp_path / "model")
    write_records(tmp_path / "records.jsonl")
    argv = finetune_options(tmp_path, "out", packing=True, max_steps=1, eval_fraction=0.0, reflora_warmup_steps=0)
    endings = run_ranks(_ending, 2, engine, argv, init_process_group=False)
    if name == "llama":
        assert endings == ["", ""]
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
        return
    for rank, ending in enumerate(endings):
        assert ending.startswith(f"finetune.py: error: rank {rank}: packing=True: the examples of a row see each other")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_every_start_estimates_on_examples_that_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA-GA's copy of the base has the cache that its checkpoint asks for, as every LLaMA's does, switched off."""
    seen = []
    saved_architecture("llama", tmp_path / "model", use_cache=True)
    write_records(tmp_path / "records.jsonl")
    load_model = finetune.load_model

    def recorded(*arguments: Any) -> Any:
        model = load_model(*arguments)
        model.register_forward_pre_hook(lambda module, *_: seen.append(module.config.use_cache))
        return model

    monkeypatch.setattr(finetune, "load_model", recorded)
    finetune.main(
        finetune_options(tmp_path, "out", packing=True, init_lora_weights="lora_ga", max_steps=1, eval_fraction=0.0)
    )
    assert len(seen) > 1 and not any(seen)


def _generator(name: str, std: float | None = 0.3) -> Any:
    model = small_architecture(name, std)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=0, num_beams=2)
    return model


@pytest.mark.parametrize("name", [*APART, "opt", "bloom", "falcon", "mpt", "mamba", "falcon_h1", "lfm2"])
def test_models_that_read_the_mask_are_evaluated_in_batches(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        require_same_in_batch(_generator(name).to(dtype), TOKENS)


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma"])
def test_models_that_do_not_are_evaluated_one_by_one(name: str) -> None:
    with pytest.raises(BatchingChangesExamples, match=r"answers otherwise in a batch.*set --batch_size 1"):
        require_same_in_batch(_generator(name), TOKENS)


def test_an_evaluation_in_batches_is_refused_before_an_answer(tmp_path: Path) -> None:
    saved_architecture("rwkv", tmp_path / "model", std=0.3)
    write_questions(tmp_path / "data")
    argv = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--tasks", "boolq", "--limit", "2"]
    argv += ["--max_new_tokens", "2", "--disable_tqdm", "True"]
    with pytest.raises(SystemExit, match=r"evaluate.py: error: .*set --batch_size 1"):
        evaluate.main([*argv, "--batch_size", "2", "--output_dir", str(tmp_path / "two")])
    assert not list((tmp_path / "two").glob("answers*"))
    evaluate.main([*argv, "--batch_size", "1", "--output_dir", str(tmp_path / "one")])
    assert len((tmp_path / "one" / "answers.rank0.jsonl").read_text().splitlines()) == 2
