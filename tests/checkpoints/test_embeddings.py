"""A vocabulary that is not the base's: its embedding and head are saved, loaded, resumed, merged and evaluated."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers.utils.hub
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from launchers.evaluation import generation
from reflora_dist import RefLoRACallback, RefLoRAConfig, convert_adapter, initialize_adapters, tall_adapters
from reflora_dist.checkpoints.training_state import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from reflora_dist.export.consolidate import consolidate_adapter
from reflora_dist.export.merge import merge_adapter
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES as WRAPPED
from tests.support.engines_under_test import trainer as trainer_engines
from tests.support.engines_under_test.zero import zero_config
from tests.support.workloads import synthetic_workload

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}
VOCABULARY = 64
TOKENS = torch.tensor([[3, 61, 5, 60, 7, 63, 9, 62]])
# what is adapted beside the attention
KINDS: dict[str, dict[str, Any]] = {
    "attention": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "embedding-saved": {"modules_to_save": ["embed_tokens"]},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "both-saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [61, 63]},
}
ENGINES = ("single", "ddp", "fsdp2", "fsdp1", "zero2", "zero3")
OTHERS = ("fsdp2", "fsdp1", "zero2")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_base(tmp_path_factory.mktemp("base"), tied=request.param)


def _save_base(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=tied, initializer_range=0.3)).save_pretrained(folder)
    return folder


def _resized(base: Path, seed: int) -> Any:
    """The base with room for more tokens; the new rows are drawn anew by every seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(61, pad_to_multiple_of=8, mean_resizing=False)
    assert model.config.vocab_size == VOCABULARY
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[60:].normal_(std=0.3)
    return model


def _model(base: Path, kind: str, seed: int) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **KINDS[kind]}
    return get_peft_model(_resized(base, seed), LoraConfig(**settings))


def _randomized(model: PeftModel) -> PeftModel:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    model.eval()
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_resized_embedding_is_saved_and_loaded(kind: str, base: Path, tmp_path: Path) -> None:
    """The logits after loading are those before saving, whatever else is adapted: by PEFT, and into a running model,
    which takes PEFT's own file, too.
    """
    model = _randomized(_model(base, kind, seed=1))
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(_logits(PeftModel.from_pretrained(_resized(base, 2), tmp_path / "adapter")), _logits(model))
    other = _model(base, kind, seed=3)
    load_adapter(other, None, tmp_path / "adapter")
    assert torch.equal(_logits(other), _logits(model))
    if kind in ("embedding", "head"):
        return  # PEFT leaves out the one that is not adapted
    model.save_pretrained(tmp_path / "peft")
    other = _model(base, kind, seed=4)
    load_adapter(other, None, tmp_path / "peft")
    assert torch.equal(_logits(other), _logits(model))


def test_an_embedding_of_the_bases_size_is_not_saved(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def _cache(base: Path, folder: Path) -> str:
    """The hub's cache with the configuration of a base that is called "someone/base"."""
    snapshot = folder / "models--someone--base" / "snapshots" / ("0" * 40)
    refs = snapshot.parents[1] / "refs"
    for made in (snapshot, refs):
        made.mkdir(parents=True)
    (refs / "main").write_text(snapshot.name)
    (snapshot / "config.json").write_bytes((base / "config.json").read_bytes())
    return str(folder)


def test_a_base_on_the_hub_is_looked_up_in_its_cache_only(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of the hub. Where the cache has no configuration either, what to do is said."""
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", _cache(base, tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_OFFLINE", False)
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    model = _model(base, "attention", seed=1)
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    save_adapter(model, tmp_path / "cached")
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "cached" / "adapter_model.safetensors")
    model.peft_config["default"].base_model_name_or_path = "someone/else"
    with pytest.warns(UserWarning, match=r"'someone/else' is not on this machine.*modules_to_save"):
        save_adapter(model, tmp_path / "unknown")
    assert not asked


def test_files_without_the_embedding_are_named(base: Path, tmp_path: Path) -> None:
    """Those of another release, and those for a model that was not resized."""
    model = _randomized(_model(base, "attention", seed=1))
    save_adapter(model, tmp_path / "resized")
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    with pytest.warns(UserWarning, match="holds no base_model.model.model.embed_tokens.weight"):
        load_adapter(model, None, tmp_path / "without")
    bare = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    before = _logits_of_known(bare)
    with pytest.raises(ValueError, match=r"call resize_token_embeddings\(64\) on the base before get_peft_model"):
        load_adapter(bare, None, tmp_path / "resized")
    assert torch.equal(_logits_of_known(bare), before)


@torch.no_grad()
def _logits_of_known(model: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS % 60).logits


# --- engines ---


def _wrap(model: PeftModel, engine: str) -> tuple[Any, Any]:
    engine, _, tall = engine.partition("+")
    if tall:
        assert tall_adapters(model)
    if engine == "fsdp2":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    wrapped: Any = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    if engine == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        wrapped = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    if not engine.startswith("zero"):
        return wrapped, optimizer
    more = {"stage3_param_persistence_threshold": 0} if engine == "zero3" else {}
    config = zero_config(synthetic_workload(steps=1).settings, 1, int(engine[4]), **more)
    wrapped, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return wrapped, optimizer


def _save_and_resume(rank: int, world_size: int, engine: str, kind: str, base: Path, folder: Path) -> None:
    """Two models that differ in the rows of the added tokens, until the second loads what the first saved."""
    first, optimizer = _wrap(_randomized(_model(base, kind, seed=1)), engine)
    save_adapter(first, folder / "adapter")
    save_checkpoint(folder / "checkpoint", first, optimizer)
    second, optimizer = _wrap(_model(base, kind, seed=2), engine)
    load_checkpoint(folder / "checkpoint", second, optimizer)
    third, optimizer = _wrap(_model(base, kind, seed=3), engine)
    load_adapter(third, optimizer, folder / "adapter")
    logits = {name: _logits(model) for name, model in (("resumed", second), ("loaded", third))}
    if rank == 0:
        save_file(logits, folder / "logits.safetensors")


def _engine_cases() -> Any:
    default = {("zero3", "attention"), ("fsdp1", "attention"), ("zero3+tall", "embedding")}
    for engine in (*ENGINES, "fsdp2+tall", "zero3+tall"):
        for kind in ("attention", "embedding", "head-saved"):
            if engine == "fsdp1" and kind != "attention":
                continue  # frozen and trained parameters in one unit of its root
            marks = [] if (engine, kind) in default else [pytest.mark.all_ranks]
            yield pytest.param(engine, kind, marks=marks)


@pytest.mark.parametrize(("engine", "kind"), _engine_cases())
def test_engines_save_it_and_resume_with_it(engine: str, kind: str, base: Path, tmp_path: Path) -> None:
    """The files are those of one process, and a resumed model, whose added rows were others, computes the same. So
    does the adapter that is put together from the sharded state.
    """
    model = _randomized(_model(base, kind, seed=1))
    save_adapter(model, tmp_path / "expected")
    run_ranks(_save_and_resume, 1 if engine == "single" else 2, engine, kind, base, tmp_path)
    expected = load_file(tmp_path / "expected" / "adapter_model.safetensors")
    consolidate_adapter(tmp_path / "checkpoint", tmp_path / "consolidated")
    for folder in ("adapter", "checkpoint", "consolidated"):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in expected), folder
    for name, logits in load_file(tmp_path / "logits.safetensors").items():
        # an engine's forward may use another kernel; rows of another draw move logits by 1 and more
        assert torch.allclose(logits, _logits(model), atol=1e-4), name


def _train(
    rank: int, world_size: int, engine: str, base: Path, cache: str, folder: Path, seed: int, resume: str | None
) -> None:
    """Three steps of a Trainer, or those after its checkpoint; without a network PEFT cannot tell the base's size."""
    transformers.utils.hub.constants.HF_HUB_CACHE = cache
    for version in (1, 2):  # what Trainer does not complete by itself
        trainer_engines._FSDP_CONFIG[version]["state_dict_type"] = "SHARDED_STATE_DICT"
    settings = synthetic_workload(steps=1).settings
    batches = torch.randint(VOCABULARY, (3, 4, 16), generator=torch.Generator().manual_seed(0))
    model = _model(base, "attention", seed)
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    callback = RefLoRACallback(RefLoRAConfig(warmup_steps=1))
    arguments = {"output_dir": str(folder / "run"), "save_strategy": "steps", "save_steps": 2}
    trainer = WRAPPED[engine].trainer(model, batches, settings, [callback], **arguments)
    trainer.train(resume_from_checkpoint=resume)
    save_adapter(trainer.model_wrapped, folder / f"end-{seed}")


@pytest.mark.parametrize(
    "engine",
    ["zero3-trainer", "ddp-trainer", *(pytest.param(f"{e}-trainer", marks=pytest.mark.all_ranks) for e in OTHERS)],
)
def test_a_trainers_checkpoints_have_it_and_resume_with_it(engine: str, tmp_path: Path) -> None:
    """A run whose added rows were drawn anew goes on as the first one: the callback completes Trainer's checkpoint."""
    base = _save_base(tmp_path / "base", tied=False)
    cache = _cache(base, tmp_path / "hub")
    run_ranks(_train, 2, engine, base, cache, tmp_path, 1, None)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.rmtree(tmp_path / "run" / "checkpoint-3", ignore_errors=True)
    run_ranks(_train, 2, engine, base, cache, tmp_path, 2, str(checkpoint))
    saved = load_file(checkpoint / "adapter_model.safetensors")
    whole, resumed = (load_file(tmp_path / f"end-{seed}" / "adapter_model.safetensors") for seed in (1, 2))
    assert saved.keys() == whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        frozen = ".lora_" not in key
        assert not frozen or torch.equal(saved[key], tensor), key
        # factors would differ by 1e-3 and more after a step on other rows
        assert torch.allclose(resumed[key], tensor, rtol=0, atol=0 if frozen else 1e-5), key


# --- from files ---


@pytest.mark.parametrize("kind", ["attention", "embedding", "head-saved"])
def test_a_state_with_the_base_in_it_gives_the_added_tokens(kind: str, base: Path, tmp_path: Path) -> None:
    """As accelerate's save_state leaves it, without an adapter's file beside it."""
    model = _randomized(_model(base, kind, seed=1))
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    consolidate_adapter(tmp_path, tmp_path / "adapter")
    assert torch.equal(_logits(PeftModel.from_pretrained(_resized(base, 2), tmp_path / "adapter")), _logits(model))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tokens"])
def test_a_merged_model_has_the_added_tokens(kind: str, base: Path, tmp_path: Path) -> None:
    """It computes what PEFT does with the adapter beside the base, and its configuration has the vocabulary's size."""
    model = _randomized(_model(base, kind, seed=1))
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == VOCABULARY
    # W + s B A is rounded once where the adapter beside it sums twice
    assert torch.allclose(_logits(merged), _logits(model), atol=1e-4)


def _save_whole(rank: int, world_size: int, engine: str, base: Path, folder: Path) -> None:
    wrapped, _ = _wrap(_randomized(_model(base, "attention", seed=1)), engine)
    wrapped.save_checkpoint(str(folder), tag="whole")


@pytest.mark.parametrize("engine", ["zero3", pytest.param("zero2", marks=pytest.mark.all_ranks)])
def test_deepspeeds_own_checkpoint_gives_the_added_tokens(engine: str, tmp_path: Path) -> None:
    """It holds the frozen parameters, unless told otherwise."""
    base = _save_base(tmp_path / "base", tied=False)
    run_ranks(_save_whole, 2, engine, base, tmp_path / "checkpoint")
    model = _randomized(_model(base, "attention", seed=1))
    model.peft_config["default"].save_pretrained(str(tmp_path / "checkpoint"))
    consolidate_adapter(tmp_path / "checkpoint", tmp_path / "adapter")
    assert torch.equal(_logits(PeftModel.from_pretrained(_resized(base, 2), tmp_path / "adapter")), _logits(model))


def _tokenizer(folder: Path, size: int) -> None:
    words = {f"word{index}": index for index in range(size)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "word0"))).save_pretrained(folder)


def test_a_tokenizer_with_ids_that_the_embedding_lacks_is_not_merged(base: Path, tmp_path: Path) -> None:
    """Unless the base comes with the same one; nothing is left behind."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    save_adapter(model, tmp_path / "adapter")
    _tokenizer(tmp_path / "adapter", 61)
    with pytest.raises(ValueError, match=r"tokenizer has 61 ids and the merged embedding 60 rows.*save_adapter"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    _tokenizer(tmp_path / "fitting", 60)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tokenizer_dir=tmp_path / "fitting")
    merged = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert len(merged) == 60


def test_an_adapter_with_the_head_alone_is_not_merged(tmp_path: Path) -> None:
    """As releases before wrote it, and PEFT does where LoRA adapts the head: the embedding's rows are lost."""
    base = _save_base(tmp_path / "base", tied=False)
    model = _model(base, "head-saved", seed=1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"vocabulary of 64.*lacks model.embed_tokens.weight: save it anew"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="holds lm_head but not the embedding: save it anew"):
        generation.load_model(str(base), str(tmp_path / "adapter"), "auto", torch.device("cpu"), _greedy())


def _greedy() -> GenerationConfig:
    return GenerationConfig(eos_token_id=1, pad_token_id=2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_more_tokens_is_evaluated(kind: str, base: Path, tmp_path: Path) -> None:
    """On the base as it is stored, which is resized on the way."""
    model = _randomized(_model(base, kind, seed=1))
    save_adapter(model, tmp_path / "adapter")
    loaded = generation.load_model(str(base), str(tmp_path / "adapter"), "auto", torch.device("cpu"), _greedy())
    assert torch.equal(_logits(loaded), _logits(model))


def test_a_start_that_changes_the_base_keeps_it(base: Path, tmp_path: Path) -> None:
    model = _model(base, "attention", seed=1)
    initialize_adapters(model, "pissa")
    save_adapter(model, tmp_path / "trained")
    convert_adapter(tmp_path / "trained", tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(_resized(base, 2), tmp_path / "adapter")
    assert torch.allclose(_logits(loaded), _logits(model), atol=1e-4)  # W - s B0 A0 is rounded
