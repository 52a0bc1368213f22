"""Starts that change the base: what is refused, and what needs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from reflora_dist import (
    RefLoRACallback,
    RefLoRAConfig,
    attach,
    convert_adapter,
    export_adapter,
    initialize_adapters,
    replay_initialization,
)
from reflora_dist.checkpoints.start_file import FILE_NAME
from reflora_dist.checkpoints.training_state import load_adapter, load_checkpoint, save_adapter, save_checkpoint
from tests.support.cluster import run_ranks
from tests.support.initializations import LOGIT_TOLERANCE, WORKLOAD, base_model, logits_of


def _started(init: str = "kaiming_both", **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(base_model(), LoraConfig(**{**WORKLOAD.lora, **lora}))
    initialize_adapters(model, init)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(_started(), folder)
    return folder


def _fresh(base: Any = None, **lora: Any) -> PeftModel:
    return get_peft_model(base or base_model(), LoraConfig(**{**WORKLOAD.lora, **lora}))


def test_a_quantized_base_is_refused() -> None:
    model = _fresh()
    inner: Any = model.get_base_model()
    layer = inner.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj.default is quantized \(Parameter, torch.int8\).*load the base in bf"):
        initialize_adapters(model, "kaiming_both")


def test_a_shared_base_weight_is_refused() -> None:
    base = LlamaForCausalLM(LlamaConfig(**{**WORKLOAD.llama, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"embed_tokens.default is shared with another module"):
        initialize_adapters(_fresh(base, target_modules=["embed_tokens"]), "kaiming_both")


def test_a_second_change_is_refused(saved: Path) -> None:
    model = _started()
    with pytest.raises(ValueError, match="may have been changed already"):
        initialize_adapters(model, "pissa")
    with pytest.raises(ValueError, match="may have been changed already"):
        replay_initialization(model, saved)
    with pytest.raises(ValueError, match=r"init_lora_weights='olora'.*init_lora_weights=True"):
        initialize_adapters(_fresh(init_lora_weights="olora"), "kaiming_both")
    changed = _fresh(base=_started().unload())  # the mark is gone with the adapter, the change is not
    with pytest.raises(ValueError, match="has been changed already; build the model anew"):
        replay_initialization(changed, saved)


@pytest.mark.parametrize("kind", ["other-weights", "bf16", "alpha", "rank", "targets"])
def test_replaying_on_another_model_is_refused(saved: Path, kind: str) -> None:
    base: Any = base_model()
    lora: dict[str, Any] = {}
    if kind == "other-weights":
        base.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6
        message = r"layers.1.mlp.up_proj is not the one that training began from: load the same base"
    elif kind == "bf16":
        base, message = base.bfloat16(), "was torch.float32 when training began and is torch.bfloat16 now"
    elif kind == "alpha":
        lora, message = {"lora_alpha": 17}, "has scaling 2.0 there and 2.125 here"
    elif kind == "rank":
        lora, message = {"r": 4, "lora_alpha": 8}, "was trained with r=8 .* this model has r=4"
    else:
        lora, message = {"target_modules": ["q_proj"]}, "has scaling 2.0 there and None here"
    model = _fresh(base, **lora)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        replay_initialization(model, saved)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["missing", "cut", "altered", "another-run"])
def test_initial_factors_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "sub" / "adapter"
    save_adapter(_started(), folder)
    file = folder / FILE_NAME
    error: type[Exception] = ValueError
    if kind == "missing":
        file.unlink()
        error, message = FileNotFoundError, "copy it from the output folder or from another checkpoint"
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
        message = "cannot be read"
    elif kind == "altered":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        message = "is damaged: its factors are not those"
    else:
        torch.manual_seed(1)
        other = _fresh()
        initialize_adapters(other, "kaiming_both")
        save_adapter(other, tmp_path / "other")
        file.write_bytes((tmp_path / "other" / FILE_NAME).read_bytes())
        message = "belongs to .* not to"
    with pytest.raises(error, match=message):
        replay_initialization(_fresh(), folder)
    with pytest.raises(error, match=message):
        convert_adapter(folder, tmp_path / "converted")


def test_the_file_in_the_folder_above_is_found(tmp_path: Path) -> None:
    save_adapter(_started(), tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / FILE_NAME).rename(tmp_path / FILE_NAME)
    replay_initialization(_fresh(), tmp_path / "checkpoint-1")


def test_what_needs_no_replay_or_conversion(tmp_path: Path) -> None:
    """An ordinary adapter replays nothing, is exported as it is, and is not converted."""
    model = _fresh()
    export_adapter(model, tmp_path)
    assert not (tmp_path / FILE_NAME).exists() and json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    replay_initialization(model, tmp_path)
    assert torch.equal(logits_of(model), logits_of(base_model()))
    with pytest.raises(ValueError, match="nothing to convert"):
        convert_adapter(tmp_path, tmp_path / "converted")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_peft_changed_itself_is_warned_of(init: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"init_lora_weights='{init}' changed the base.*initialize_adapters"):
        save_adapter(_fresh(init_lora_weights=init), tmp_path)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("forgot", [True, False])
def test_factors_meet_only_their_own_base(forgot: bool, tmp_path: Path) -> None:
    """A replay that was forgotten, and one that should not have been: loading a checkpoint or an adapter says so."""
    written, read = (_started(), _fresh()) if forgot else (_fresh(), _started())
    message = "call reflora_dist.replay_initialization" if forgot else "belongs to an unchanged base"
    optimizer = _optimizer(written)
    handle = attach(written, optimizer, RefLoRAConfig())
    save_checkpoint(tmp_path, written, optimizer, handle)
    for load in (
        lambda: load_checkpoint(tmp_path, read, _optimizer(read)),
        lambda: load_adapter(read, _optimizer(read), tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def _train(model: Any, output: Path, resume: str | None = None) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        output_dir=str(output), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    data: Any = [{"input_ids": row, "labels": row} for row in WORKLOAD.batches[0]]
    callback = RefLoRACallback(RefLoRAConfig(warmup_steps=0))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=default_data_collator, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)


def _trainer_run(rank: int, world_size: int, folder: str) -> None:
    _train(_started(), Path(folder))
    checkpoint = f"{folder}/checkpoint-1"
    with pytest.raises(ValueError, match=r"call reflora_dist.replay_initialization"):
        _train(_fresh(), Path(folder), checkpoint)
    model = _fresh()
    replay_initialization(model, checkpoint)
    _train(model, Path(folder), checkpoint)


def test_the_callback_refuses_a_forgotten_replay(tmp_path: Path) -> None:
    run_ranks(_trainer_run, 1, str(tmp_path), init_process_group=False)
    assert (tmp_path / "checkpoint-2" / FILE_NAME).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "eva"}, "'eva' is not supported: needs the activations"),
        ({"init": "lora_ga"}, "needs lora_ga_config"),
        ({"init": "lora_ga", "lora_ga_config": LoraGAConfig()}, "carries no gradient: run peft's preprocess_loraga"),
        (
            {"init": "lora_ga", "lora_ga_config": LoraGAConfig(scale="weight_svd")},
            "scale='weight_svd' is not supported",
        ),
    ],
)
def test_a_start_that_lacks_something_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialize_adapters(_fresh(), **change)


def test_several_adapters_and_merged_ones_are_refused() -> None:
    model = _fresh()
    model.add_adapter("other", LoraConfig(**WORKLOAD.lora))
    with pytest.raises(ValueError, match=r"\['default', 'other'\]: a change of the base is for one"):
        initialize_adapters(model, "kaiming_both")
    merged = _fresh()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base"):
        initialize_adapters(merged, "kaiming_both")
    with pytest.raises(TypeError, match="contains no PeftModel"):
        initialize_adapters(base_model(), "kaiming_both")


def _too_late(rank: int, world_size: int, engine_name: str) -> str:
    from tests.support.engines_under_test import ENGINES

    wrapped = ENGINES[engine_name].wrap(_fresh(), WORKLOAD.settings, 6)
    with pytest.raises(ValueError) as error:
        initialize_adapters(wrapped.model, "kaiming_both")
    return str(error.value)


@pytest.mark.parametrize(
    ("engine_name", "message"),
    [("zero3", "given to deepspeed.initialize"), ("zero2", "given to deepspeed.initialize"), ("fsdp1-full", "FSDP1")],
)
def test_a_start_that_comes_too_late_is_refused(engine_name: str, message: str) -> None:
    assert all(message in error for error in run_ranks(_too_late, 2, engine_name))


def _unequal_bases(rank: int, world_size: int) -> str:
    base = base_model()
    base.model.layers[0].self_attn.q_proj.weight.data[0, 0] += rank
    with pytest.raises(ValueError) as error:
        initialize_adapters(_fresh(base), "kaiming_both")
    return str(error.value)


def test_ranks_with_unequal_bases_are_told() -> None:
    for error in run_ranks(_unequal_bases, 2):
        assert "rank 1 holds another base weight" in error and "q_proj" in error


def _fails_on_one_rank(rank: int, world_size: int) -> str:
    from reflora_dist.starts import initialize as initialization

    module: Any = initialization
    original = initialization.peft_factors

    def broken(pair: Any, *args: Any) -> Any:
        if rank == 1 and "layers.1" in pair.name:
            raise torch.linalg.LinAlgError("the decomposition did not converge")
        return original(pair, *args)

    module.peft_factors = broken
    with pytest.raises(RuntimeError) as error:
        initialize_adapters(_fresh(), "pissa")
    return str(error.value)


def test_a_decomposition_that_fails_on_one_rank_fails_on_all() -> None:
    first, second = run_ranks(_fails_on_one_rank, 2)
    assert "computing the initial factors failed on rank 1" in first and "did not converge" in second


def test_tolerances_can_tell() -> None:
    """A base that was not changed, and one that was not changed back, are far beyond the tolerances."""
    model = _started()
    layer: Any
    for layer in model.get_base_model().modules():
        if hasattr(layer, "lora_B") and "default" in layer.lora_B:
            layer.lora_B["default"].weight.data.zero_()
    assert (logits_of(model) - logits_of(base_model())).abs().max() > 1e4 * LOGIT_TOLERANCE
