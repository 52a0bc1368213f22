"""The adapter of a sharded checkpoint, offline: against the masters that the ranks held when they saved it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from launchers import export
from reflora_dist import attach
from reflora_dist.checkpoints.training_state import save_checkpoint
from reflora_dist.export.consolidate import consolidate_adapter, find_state
from reflora_dist.lora_sb import LoRASBConfig, initialize_lora_xs
from tests.support.adapters import VARIANTS, variant_base, variant_model, wrap_variant
from tests.support.checkpoints import convert_to_universal, method_config, wrapped_workload
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES, WITHOUT_TALL
from tests.support.engines_under_test.common import train_on
from tests.support.initializations import LOGIT_TOLERANCE, METHOD, WORKLOAD, base_model, build_started, logits_of
from tests.support.lora_xs import xs_model
from tests.support.trainer_checkpoints import train_with_checkpoints
from tests.support.workloads import Factors, as_peft_names_them, build_model, synthetic_workload

STEPS = 2


def _masters(engine_name: str, wrapped: Any) -> Factors:
    """Every trained parameter, whole, in the precision in which it is trained."""
    if "bf16" not in engine_name:
        return wrapped.factors()
    from deepspeed.utils import safe_get_full_fp32_param  # right without round_robin_gradients

    model = wrapped.model.module
    masters = {name: safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters() if p.requires_grad}
    return as_peft_names_them(masters)


def _train(rank: int, world_size: int, engine_name: str, folder: str) -> Factors:
    workload, wrapped = wrapped_workload(engine_name, world_size)
    handle = attach(wrapped.model, wrapped.optimizer, method_config("reflora"))
    for batch in workload.batches[:STEPS]:
        train_on(wrapped, batch)
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
    default = {("fsdp2", 2), ("zero2", 2), ("zero3", 3), ("zero2-round-robin", 3), ("fsdp2+tall", 2), ("zero3+tall", 3)}
    engines = ("ddp", "fsdp2", "fsdp2-shard1", "fsdp1-full", "fsdp1-flat", "zero1", "zero2", "zero2-round-robin")
    engines += ("zero2-two-groups", "zero3", "zero3-two-groups", "zero3-subgroups", "zero3-persist-all")
    engines += ("zero2-bf16-masters", "zero3-bf16-masters")
    for name in (*engines, *(f"{name}+tall" for name in engines if name not in WITHOUT_TALL)):
        for world_size in ENGINES[name.partition("+")[0]].world_sizes[:2]:
            marks = [] if (name, world_size) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, world_size, marks=marks, id=f"{name}-{world_size}")


@pytest.mark.parametrize(("engine_name", "world_size"), _cases())
def test_the_adapter_of_a_checkpoint_is_that_of_the_masters(engine_name: str, world_size: int, tmp_path: Path) -> None:
    """From the shards: with another adapter's values in the file beside them, and without that file."""
    masters = run_ranks(_train, world_size, engine_name, str(tmp_path / "checkpoint"))[0]
    saved = tmp_path / "checkpoint" / "adapter_model.safetensors"
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(saved).items()}, saved)
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
        ("zero3+tall", 2),
        *(
            pytest.param(name, 2, marks=pytest.mark.all_ranks)
            for name in ("zero1", "zero2", "zero1-bf16", "zero3-two-groups", "zero3-bf16-masters", "zero2+tall")
        ),
    ],
)
def test_the_adapter_of_a_universal_checkpoint_is_that_of_the_masters(
    engine_name: str, world_size: int, tmp_path: Path
) -> None:
    """What ds_to_universal made; and an error that names the file where one is missing or truncated."""
    masters = run_ranks(_train, world_size, engine_name, str(tmp_path / "checkpoint"))[0]
    convert_to_universal(tmp_path / "checkpoint")
    universal = tmp_path / "checkpoint" / "state_universal"
    consolidate_adapter(universal, tmp_path / "adapter")
    _assert_exported(tmp_path / "adapter", masters)
    victim = next((universal / "zero").iterdir()) / "fp32.pt"
    victim.write_bytes(victim.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"fp32.pt is truncated"):
        consolidate_adapter(universal, tmp_path / "other")
    victim.unlink()
    with pytest.raises(ValueError, match=r"fp32.pt is missing"):
        consolidate_adapter(universal, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "engine_name",
    [
        "fsdp2-trainer",
        "zero3-trainer",
        *(pytest.param(n, marks=pytest.mark.all_ranks) for n in ("fsdp1-trainer", "zero2-trainer")),
    ],
)
def test_checkpoints_of_hf_trainer(engine_name: str, tmp_path: Path) -> None:
    """Its own layout; the configuration is found in the folder above the shards too."""
    outcome = run_ranks(train_with_checkpoints, 2, engine_name, "reflora", str(tmp_path / "run"))[0]
    checkpoint = tmp_path / "run" / "checkpoint-4"
    (checkpoint / "adapter_model.safetensors").unlink()
    state = find_state(checkpoint)
    assert state is not None and state != checkpoint
    for number, source in enumerate((checkpoint, state)):
        consolidate_adapter(source, tmp_path / f"adapter{number}")
        _assert_exported(tmp_path / f"adapter{number}", outcome.saved[4])


# --- kinds of adapters ---


def _train_variant(rank: int, world_size: int, engine_name: str, variant: str, folder: str) -> None:
    workload = synthetic_workload(steps=1)
    wrapped = wrap_variant(engine_name, variant_model(variant), world_size)
    handle = attach(wrapped.model, wrapped.optimizer, method_config("lora"))
    train_on(wrapped, workload.batches[0])
    save_checkpoint(f"{folder}/checkpoint", wrapped.model, wrapped.optimizer, handle)
    wrapped.model.eval()
    with torch.no_grad():
        logits = wrapped.model(input_ids=workload.batches[0][:2]).logits
    if rank == 0:
        save_file({"logits": logits.contiguous()}, f"{folder}/logits.safetensors")


def _variant_cases() -> Iterator[Any]:
    default = {("fsdp2", "modules-to-save"), ("zero3", "dora")}
    for engine_name in ("fsdp2", "zero2", "zero3"):
        for variant in (*VARIANTS, "two-adapters"):
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
    loaded = PeftModel.from_pretrained(variant_base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = loaded(input_ids=synthetic_workload(steps=1).batches[0][:2]).logits
    # the distributed forward may use another kernel; a stale or missing parameter moves logits by 1e-2
    assert torch.allclose(logits, load_file(tmp_path / "logits.safetensors")["logits"], atol=1e-5)


@pytest.mark.parametrize("variant", [*VARIANTS, "two-adapters"])
def test_a_state_with_the_base_in_it_gives_the_adapter_alone(variant: str, tmp_path: Path) -> None:
    """As accelerate's save_state leaves it, every parameter of the model in it, and adapters of several names."""
    model = variant_model(variant)
    model.save_pretrained(tmp_path / "expected", save_embedding_layers=False)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    for adapter in model.peft_config:
        folder = tmp_path / "expected" / (adapter if adapter != "default" else "")
        consolidate_adapter(tmp_path, tmp_path / adapter, adapter=adapter, adapter_config=folder)
        expected = load_file(folder / "adapter_model.safetensors")
        exported = load_file(tmp_path / adapter / "adapter_model.safetensors")
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[key], expected[key]) for key in expected)


@pytest.mark.parametrize("engine_name", ["zero3", pytest.param("fsdp2", marks=pytest.mark.all_ranks)])
def test_lora_xs_takes_its_frozen_factors_from_the_file_beside(engine_name: str, tmp_path: Path) -> None:
    """R is the masters'; A and B, which no training state holds, are those saved with the configuration."""
    masters = run_ranks(_train_lora_xs, 2, engine_name, str(tmp_path / "checkpoint"))[0]
    consolidate_adapter(tmp_path / "checkpoint", tmp_path / "adapter")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    assert exported.keys() == saved.keys() and all(torch.equal(exported[key], saved[key]) for key in saved)
    assert all(torch.equal(exported[name.replace(".default", "")], master) for name, master in masters.items())
    PeftModel.from_pretrained(variant_base(), tmp_path / "adapter")
    (tmp_path / "checkpoint" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks .*lora_xs_[AB].weight; it is frozen: put the run's"):
        consolidate_adapter(tmp_path / "checkpoint", tmp_path / "other")


def _train_lora_xs(rank: int, world_size: int, engine_name: str, folder: str) -> Factors:
    workload = synthetic_workload(steps=STEPS)
    engine = ENGINES[engine_name]
    wrapped = engine.wrap(xs_model(workload), workload.settings, workload.batches.shape[1] // world_size)
    initialize_lora_xs(wrapped.model, wrapped.optimizer, LoRASBConfig(method="lora-xs"))
    for batch in workload.batches:
        train_on(wrapped, batch)
    save_checkpoint(folder, wrapped.model, wrapped.optimizer)
    return {name: factor for name, factor in wrapped.factors().items() if "lora_xs_R" in name}


@pytest.mark.parametrize("engine_name", ["fsdp2", pytest.param("zero3", marks=pytest.mark.all_ranks)])
def test_a_changed_base_gives_an_ordinary_adapter(engine_name: str, tmp_path: Path) -> None:
    """Plain PEFT computes the trained logits on the original base; so does the base with the checkpoint merged."""
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    trained = run_ranks(_train_changed, 2, engine_name, str(tmp_path / "checkpoint"))[0]
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text("{{ messages }}")
    options = ["--adapter", str(tmp_path / "checkpoint"), "--output_dir"]
    export.main([*options, str(tmp_path / "adapter")])
    export.main([*options, str(tmp_path / "merged"), "--merge", "--model", str(tmp_path / "base")])
    for name in ("adapter", "merged"):  # the tokenizer goes along
        assert (tmp_path / name / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (logits_of(base) - trained).abs().max() > 1e-2, "nothing was trained"
    for model in (
        LlamaForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(base_model(), tmp_path / "adapter"),
    ):
        assert (logits_of(model) - trained).abs().max() < 4 * LOGIT_TOLERANCE


def _train_changed(rank: int, world_size: int, engine_name: str, folder: str) -> Any:
    wrapped, _ = build_started(engine_name, "kaiming_both", world_size, None, rank)
    handle = attach(wrapped.model, wrapped.optimizer, METHOD)
    for batch in WORKLOAD.batches:
        train_on(wrapped, batch)
    save_checkpoint(folder, wrapped.model, wrapped.optimizer, handle)
    return logits_of(wrapped.model)


# --- what is refused ---


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for engine_name in ("fsdp2", "zero3"):
        run_ranks(_train, 2, engine_name, str(folder / engine_name))
    return folder


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _half(name: str) -> Any:
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def _set_config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder.parent / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("engine_name", "damage", "message"),
    [
        ("fsdp2", _without("__1_0.distcp"), "__1_0.distcp is missing: the checkpoint is damaged"),
        ("fsdp2", _half("__1_0.distcp"), r"__1_0.distcp has \d+ bytes, less than the \d+"),
        ("fsdp2", _without(".metadata"), r"\.metadata cannot be read"),
        ("fsdp2", _half(".metadata"), r"\.metadata cannot be read"),
        ("fsdp2", _without("../adapter_config.json"), "adapter_config.json, nor does the folder above"),
        ("fsdp2", _set_config(peft_type="IA3"), "peft_type='IA3'"),
        (
            "zero3",
            _without("zero_pp_rank_1_mp_rank_00_optim_states.pt"),
            "rank_1_mp_rank_00_optim_states.pt is missing",
        ),
        ("zero3", _half("zero_pp_rank_1_mp_rank_00_optim_states.pt"), "rank_1_mp_rank_00_optim_states.pt is truncated"),
        ("zero3", _half("zero_pp_rank_0_mp_rank_00_model_states.pt"), "model_states.pt is truncated"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(
    engine_name: str, damage: Any, message: str, checkpoints: Path, tmp_path: Path
) -> None:
    """Without our own record of the files, as other programs leave them; nothing is written."""
    folder = shutil.copytree(checkpoints / engine_name, tmp_path / "checkpoint")
    damage(folder / "state")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        consolidate_adapter(folder / "state", tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_unfinished_checkpoint_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    """Its record is written last; and a folder that `latest` names may be gone."""
    folder = shutil.copytree(checkpoints / "zero3", tmp_path / "checkpoint")
    (folder / "reflora.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        consolidate_adapter(folder, tmp_path / "adapter")
    (folder / "state").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="state is missing or holds no shards"):
        consolidate_adapter(folder, tmp_path / "adapter")


def test_an_adapter_of_another_name_is_not_taken(checkpoints: Path, tmp_path: Path) -> None:
    """The error says which there are."""
    with pytest.raises(ValueError, match="holds nothing of the adapter 'other'; it has default"):
        consolidate_adapter(checkpoints / "fsdp2", tmp_path / "adapter", adapter="other")


def test_the_configuration_may_lie_elsewhere(checkpoints: Path, tmp_path: Path) -> None:
    """A state without its folder, with --adapter_config naming the file or its folder."""
    shutil.copytree(checkpoints / "fsdp2" / "state", tmp_path / "state")
    shutil.copy(checkpoints / "fsdp2" / "adapter_config.json", tmp_path / "config")
    options = ["--adapter", str(tmp_path / "state"), "--output_dir"]
    export.main([*options, str(tmp_path / "one"), "--adapter_config", str(tmp_path / "config")])
    export.main([*options, str(tmp_path / "two"), "--adapter_config", str(checkpoints / "fsdp2")])
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    saved = load_file(checkpoints / "fsdp2" / "adapter_model.safetensors")
    assert one.keys() == two.keys() == saved.keys()
    assert all(torch.equal(one[key], saved[key]) and torch.equal(two[key], saved[key]) for key in saved)


def test_trained_parameters_without_a_place_are_named(tmp_path: Path) -> None:
    """Norms that were unfrozen by hand are in the state, and PEFT's format cannot hold them."""
    run_ranks(_train_norms, 1, str(tmp_path / "checkpoint"))
    with pytest.warns(UserWarning, match=r"5 trained parameters .* \(.*layernorm.weight, ...\): give them"):
        consolidate_adapter(tmp_path / "checkpoint", tmp_path / "adapter")


def _train_norms(rank: int, world_size: int, folder: str) -> None:
    workload = synthetic_workload(steps=STEPS)
    model = build_model(workload)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    wrapped = ENGINES["single"].wrap(model, workload.settings, workload.batches.shape[1])
    save_checkpoint(folder, wrapped.model, wrapped.optimizer)


@pytest.mark.all_ranks
def test_what_deepspeeds_tools_cannot_read_is_refused(tmp_path: Path) -> None:
    """BF16_Optimizer's files go through the converter only; the converter mixes up round_robin_gradients."""
    run_ranks(_train, 2, "zero1-bf16", str(tmp_path / "bf16"))
    with pytest.raises(ValueError, match=r"BF16_Optimizer.* run python -m deepspeed.checkpoint.ds_to_universal"):
        consolidate_adapter(tmp_path / "bf16", tmp_path / "adapter")
    run_ranks(_train, 3, "zero2-round-robin", str(tmp_path / "robin"))
    convert_to_universal(tmp_path / "robin")
    with pytest.raises(ValueError, match="export from the checkpoint that was converted"):
        consolidate_adapter(tmp_path / "robin" / "state_universal", tmp_path / "adapter")
