"""An adapter where a base is expected: training goes on from it, evaluation adds its base, the others refuse it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.sweep import data as convergence_data
from launchers import ask, export, finetune
from launchers.evaluate import EvaluateOptions
from launchers.evaluation import generation
from reflora_dist import RefLoRAConfig, attach, initialize_adapters
from reflora_dist.checkpoints.training_state import save_adapter
from reflora_dist.doctor.base_model import load_config
from reflora_dist.export.merge import merge_adapter
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import micro_model, write_records

_LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continued")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    _save_trained(folder, "adapter", _base(folder))
    resized = _base(folder)
    resized.resize_token_embeddings(384, mean_resizing=False)
    _save_trained(folder, "resized", resized)
    return folder


def _base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def _save_trained(folder: Path, name: str, base: Any, **changes: Any) -> None:
    model = get_peft_model(base, LoraConfig(**{**_LORA, **changes}))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(model, folder / name)


@pytest.mark.parametrize("adapter", ["adapter", "resized"])
@pytest.mark.parametrize("engine", ["single", "zero3", pytest.param("fsdp2", marks=pytest.mark.all_ranks)])
def test_training_goes_on_from_an_adapter(engine: str, adapter: str, folder: Path) -> None:
    """One step of a learning rate near zero leaves it as it was, with the embedding of the added tokens; what is
    written names the base, so that it can be continued again.
    """
    output = f"{adapter}-{engine}"
    options = finetune_options(folder, output, model=folder / adapter, max_steps=1, learning_rate=1e-9)
    run_ranks(finetune_rank, 1 if engine == "single" else 2, engine, options, init_process_group=False, timeout=240)
    first, second = (load_file(folder / name / "adapter_model.safetensors") for name in (adapter, output))
    assert first.keys() == second.keys() and ("base_model.model.lm_head.weight" in first) == (adapter == "resized")
    for key, tensor in first.items():
        assert torch.allclose(second[key], tensor, rtol=0, atol=1e-7), key  # a step of Adam is as long as its rate
    config = json.loads((folder / output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "model")


def test_a_continued_run_is_resumed(folder: Path) -> None:
    """With the same command: what its checkpoint has goes before the adapter that it began from."""
    options = {"model": folder / "adapter", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run_ranks(finetune_rank, 1, "single", finetune_options(folder, "whole", **options), init_process_group=False)
    shutil.copytree(folder / "whole" / "checkpoint-2", folder / "again" / "checkpoint-2")
    options["resume_from_checkpoint"] = "auto"
    run_ranks(finetune_rank, 1, "single", finetune_options(folder, "again", **options), init_process_group=False)
    whole, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "again"))
    begun = load_file(folder / "adapter" / "adapter_model.safetensors")
    key = next(key for key in whole if ".lora_B." in key)
    assert not torch.allclose(whole[key], begun[key], atol=1e-3)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def _edited(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder / "adapter", target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "is an adapter with r=4, and this run's would have 8: give --lora_r 4, or merge it"),
        ({"lora_alpha": 16}, "lora_alpha=8, and this run's would have 16.0: give --lora_alpha 8, or merge it"),
        ({"rslora": True}, "use_rslora=False, and this run's would have True: give --rslora False"),
        ({"dora": True}, "use_dora=False.*give --dora False"),
        (
            {"target_modules": "q_proj"},
            "made with --target_modules down_proj gate_proj k_proj o_proj q_proj up_proj v_proj",
        ),
        ({"init_lora_weights": "pissa"}, "whose factors --init_lora_weights pissa would replace: drop the option"),
        (
            {"method": "lora-sb", "lora_alpha": None, "reflora_warmup_steps": None},
            r"--method lora-sb makes its start from the base: merge it \(export.py",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_other_settings_than_the_adapters_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        finetune.main(finetune_options(folder, "refused", model=folder / "adapter", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}.*no option gives that, or merge it"),
        ({"init_lora_weights": "pissa"}, "started by PEFT with init_lora_weights='pissa'"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "is an adapter .*it is no LoRA adapter: merge it"),
        ({"base_model_name_or_path": "{folder}/adapter"}, "adapter is an adapter .*merge that one into its base first"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_adapters_that_cannot_be_continued(folder: Path, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    changes = {key: str(folder / "adapter") if value == "{folder}/adapter" else value for key, value in changes.items()}
    edited = _edited(folder, tmp_path / "edited", **changes)
    with pytest.raises(SystemExit, match=message):
        finetune.main(finetune_options(folder, "refused", model=edited))


def test_checkpoints_that_are_no_adapter_by_themselves(folder: Path, tmp_path: Path) -> None:
    """One of a changed base, and one whose factors lie in a sharded state: export.py makes an adapter of each."""
    changed = get_peft_model(_base(folder), LoraConfig(**_LORA))
    initialize_adapters(changed, "pissa")
    save_adapter(changed, tmp_path / "changed")
    with pytest.raises(SystemExit, match=r"base that was changed at the start: make it an ordinary one first \(export"):
        finetune.main(finetune_options(folder, "refused", model=tmp_path / "changed"))
    edited = _edited(folder, tmp_path / "sharded")
    (edited / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"without an adapter_model.safetensors: export it from its sharded state"):
        finetune.main(finetune_options(folder, "refused", model=edited))


def test_evaluation_takes_the_adapters_base(folder: Path) -> None:
    adapter = str(folder / "adapter")
    options = EvaluateOptions(model=adapter)
    assert (options.model, options.adapter) == (str(folder / "model"), adapter)
    with pytest.raises(ValueError, match=r"is an adapter itself, and adapter=.*another: merge the first"):
        EvaluateOptions(model=adapter, adapter=str(folder / "resized"))


def test_an_adapter_is_no_base(folder: Path, tmp_path: Path) -> None:
    """To merge into, to size, to sweep over, and to ask."""
    adapter = str(folder / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter .* and no base model: merge it into the base that it names"):
        merge_adapter(folder / "resized", tmp_path / "merged", base=adapter)
    with pytest.raises(ValueError, match=r"is an adapter .*: give the base that it names"):
        load_config(adapter)
    settings: dict[str, Any] = {"max_length": 8, "max_eval_records": 1, "eval_fraction": 0.5, "cache_dir": tmp_path}
    with pytest.raises(ValueError, match=r"is an adapter .*: merge it into its base first"):
        convergence_data.prepare(adapter, [], [], **settings)
    chained = _edited(folder, tmp_path / "chained", base_model_name_or_path=adapter)
    with pytest.raises(ValueError, match="chained was trained on it; merge that one into its base first"):
        ask.load(generation.base_of(str(chained)), str(chained), "plain")


def test_a_model_is_no_adapter(folder: Path, tmp_path: Path) -> None:
    model = str(folder / "model")
    with pytest.raises(ValueError, match=r"adapter=.*model' holds no adapter_config.json: it is a model by itself"):
        EvaluateOptions(adapter=model)
    with pytest.raises(ValueError, match="it is a model by itself, give it as --model"):
        generation.load_model(model, model, "auto", torch.device("cpu"), GenerationConfig(eos_token_id=1))
    for more in ([], ["--merge"]):
        with pytest.raises(SystemExit, match="is a model by itself"):
            export.main(["--adapter", model, "--output_dir", str(tmp_path / "out"), *more])


def test_a_base_without_weights_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model" / "config.json", tmp_path)
    with pytest.raises(SystemExit, match=r"holds no model.safetensors and no model.safetensors.index.json: name"):
        paths = ["--adapter", str(folder / "adapter"), "--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]
        export.main([*paths, "--merge"])


def test_an_adapter_is_not_added_twice(folder: Path, tmp_path: Path) -> None:
    """A merged model says which adapters are in it; another one may be merged into it."""
    merge_adapter(folder / "adapter", tmp_path / "once")
    _save_trained(folder, "further", AutoModelForCausalLM.from_pretrained(tmp_path / "once"), r=2)
    merge_adapter(folder / "further", tmp_path / "twice")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "twice").num_parameters() == _base(folder).num_parameters()
    for base in ("once", "twice"):
        with pytest.raises(ValueError, match=r"with this adapter .* merged into it, which would count twice"):
            merge_adapter(folder / "adapter", tmp_path / "again", base=str(tmp_path / base))
        with pytest.raises(ValueError, match=r"with this adapter .* merged into it, which would count twice"):
            device, config = torch.device("cpu"), GenerationConfig(eos_token_id=1)
            generation.load_model(str(tmp_path / base), str(folder / "adapter"), "auto", device, config)


def test_an_adapter_that_took_a_trained_ones_place_is_refused(folder: Path) -> None:
    """transformers loads base and adapter from the adapter's folder; PEFT then draws another one of the same name."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "adapter"), LoraConfig(**_LORA))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"fresh adapter in the place of the trained one.*is_trainable=True"):
        attach(model, optimizer, RefLoRAConfig())
    with pytest.raises(ValueError, match="fresh adapter in the place of the trained one"):
        initialize_adapters(copy.deepcopy(model), "pissa")
    continued = PeftModel.from_pretrained(_base(folder), folder / "adapter", is_trainable=True)
    attach(continued, torch.optim.AdamW([p for p in continued.parameters() if p.requires_grad]), RefLoRAConfig())
