"""``finetune.py --init_lora_weights`` as a user runs it: through HF Trainer, on two ranks of every engine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launchers import finetune
from reflora_dist import convert_adapter, replay_initialization
from reflora_dist.checkpoints.start_file import FILE_NAME
from tests.support.cluster import run_ranks
from tests.support.finetune import WORLD_SIZE, finetune_options, finetuned
from tests.support.launchers import micro_model, write_records

INITS = ("kaiming_both", "pissa", "pissa_niter_4", "olora", "lora_ga")
ENGINES = ("zero3", "fsdp2", "fsdp1", "ddp", "zero2")
SETTINGS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_on_start": True,
    # S exists from the first step on, which is what these starts are for
    "reflora_warmup_steps": 0,
    "target_modules": "o_proj",
    "lora_ga_batches": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


@pytest.fixture(scope="module")
def base_loss(folder: Path) -> float:
    """The original base's loss on the held-out records: PEFT's default start leaves it as it is."""
    metrics = finetuned(folder, "default", "ddp", eval_on_start=True, max_steps=1, target_modules="o_proj")
    return metrics["held_out_loss"][0]["loss"]


def _cases() -> Iterator[Any]:
    default = {("zero3", "lora_ga"), ("fsdp2", "kaiming_both")}
    for engine in ENGINES:
        for init in INITS:
            marks = [] if (engine, init) in default else [pytest.mark.all_ranks]
            yield pytest.param(engine, init, marks=marks, id=f"{engine}-{init}")


@pytest.mark.parametrize(("engine", "init"), _cases())
def test_a_start_keeps_the_function_and_resumes(folder: Path, base_loss: float, engine: str, init: str) -> None:
    """The first evaluation gives the original base's loss; a run that resumes from a checkpoint, copied elsewhere,
    goes on as the whole run did; plain PEFT computes what was trained from the adapter that is left at the end.
    """
    name = f"{engine}-{init}"
    whole = finetuned(folder, name, engine, init_lora_weights=init, **SETTINGS)
    assert whole["report"]["applied_steps"] == 6 and whole["report"]["skipped_pairs"] == 0
    # rounding of W - s B A in fp32; a base that is not changed back moves the loss by 1e-2 and more
    assert whole["held_out_loss"][0]["loss"] == pytest.approx(base_loss, rel=1e-5)
    elsewhere = folder / f"elsewhere-{name}" / "checkpoint"
    shutil.copytree(folder / name / "checkpoint-3", elsewhere)
    settings = {**SETTINGS, "save_strategy": "no", "resume_from_checkpoint": elsewhere}
    resumed = finetuned(folder, f"resumed-{name}", engine, init_lora_weights=init, **settings)
    # a ZeRO-2 process that resumes cuts its first buckets differently: one ulp of a sum
    tolerance = 1e-6 if engine == "zero2" else 0.0
    expected = [point["loss"] for point in whole["train_loss"]]
    assert [point["loss"] for point in resumed["train_loss"]] == pytest.approx(expected, rel=tolerance, abs=0)
    _assert_equal_files(folder / name, folder / f"resumed-{name}", tolerance)
    _assert_peft_computes_what_was_trained(folder / "model", folder / name)


def _assert_equal_files(first: Path, second: Path, tolerance: float) -> None:
    for file in ("adapter_model.safetensors", FILE_NAME):
        expected, tensors = load_file(first / file), load_file(second / file)
        assert expected.keys() == tensors.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=tolerance, atol=tolerance)


def _assert_peft_computes_what_was_trained(base: Path, output: Path) -> None:
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    trained = get_peft_model(_base(base), LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"]))
    replay_initialization(trained, output / "checkpoint-6")
    trained.load_adapter(output / "checkpoint-6", "default")
    loaded = PeftModel.from_pretrained(_base(base), output)
    assert loaded.peft_config["default"].to_dict()["r"] == 8
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (trained, loaded, _base(base))]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-2, "nothing was trained"
    with pytest.raises(ValueError, match="convert_adapter"):
        PeftModel.from_pretrained(_base(base), output / "checkpoint-6")
    convert_adapter(output / "checkpoint-6", output / "converted")
    last = load_file(output / "converted" / "adapter_model.safetensors")
    assert all(
        torch.equal(last[name], tensor) for name, tensor in load_file(output / "adapter_model.safetensors").items()
    )


def _base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("init", ["orthogonal", pytest.param("gaussian", marks=pytest.mark.all_ranks)])
def test_peft_starts_that_leave_the_base_alone(folder: Path, base_loss: float, init: str) -> None:
    """They need nothing: what is written is an ordinary adapter of the r that was asked for."""
    metrics = finetuned(folder, init, "zero3", init_lora_weights=init, **{**SETTINGS, "save_strategy": "no"})
    assert metrics["held_out_loss"][0]["loss"] == pytest.approx(base_loss, rel=1e-5)
    assert not (folder / init / FILE_NAME).exists()
    assert PeftModel.from_pretrained(_base(folder / "model"), folder / init).peft_config["default"].to_dict()["r"] == 4


@pytest.mark.parametrize("init", ["kaiming_both", pytest.param("pissa", marks=pytest.mark.all_ranks)])
def test_ranks_without_a_base_of_their_own(folder: Path, base_loss: float, init: str) -> None:
    """accelerate's ``cpu_ram_efficient_loading``, as in the configuration that is shipped: the first rank alone needs
    to read the base; it changes it and sends it to the others, which hold NaN here.
    """
    argv = finetune_options(folder, f"efficient-{init}", init_lora_weights=init, **SETTINGS)
    run_ranks(_finetune_efficiently, WORLD_SIZE, argv, timeout=240, init_process_group=False)
    metrics = finetune.recorder.json.loads((folder / f"efficient-{init}" / "metrics.json").read_text())
    assert metrics["held_out_loss"][0]["loss"] == pytest.approx(base_loss, rel=1e-5)
    plain = finetuned(folder, f"inefficient-{init}", "fsdp2", init_lora_weights=init, **SETTINGS)
    assert metrics["train_loss"] == plain["train_loss"]


def _finetune_efficiently(rank: int, world_size: int, argv: list[str]) -> None:
    from tests.support.engines_under_test.accelerated import fsdp_on_cpu
    from tests.support.finetune import launch_environment

    os.environ.update(launch_environment("fsdp2"))
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "true"
    load_model = finetune.load_model

    def load_on_the_first_rank(*args: Any) -> Any:
        model = load_model(*args)
        if rank > 0:
            # transformers 5.23 reads the base on every rank all the same
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
        return model

    module: Any = finetune
    module.load_model = load_on_the_first_rank
    with fsdp_on_cpu():
        finetune.main(argv)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "corda"}, "'corda' is not supported: needs covariances.*preprocess_corda.*kaiming_both"),
        ({"init_lora_weights": "eva"}, "'eva' is not supported: needs the activations"),
        ({"init_lora_weights": "loftq"}, "'loftq' is not supported: quantizes the base"),
        ({"init_lora_weights": "pissa_niter_x"}, "init='pissa_niter_x' is not supported: use .*or one of default"),
        ({"init_lora_weights": "pissa", "lora_r": 40}, "takes 40 singular vectors.*lower r=40"),
        ({"init_lora_weights": "lora_ga", "lora_r": 20}, "takes 40 singular vectors"),
        ({"init_lora_weights": "pissa", "target_modules": "embed_tokens"}, "is for linear layers"),
        ({"lora_ga_batches": 0}, "lora_ga_batches=0"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_start_that_cannot_be_made_is_named_before_training(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    argv = finetune_options(folder, "refused", **changes)
    with pytest.raises(SystemExit, match=f"(?s)finetune.py: error: .*{message}"):
        finetune.main(argv)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("kaiming_both", "default", "give --init_lora_weights kaiming_both"),
        ("default", "pissa", "a start that leaves the base alone: give --init_lora_weights default"),
        ("pissa", "kaiming_both", "give --init_lora_weights pissa"),
    ],
)
def test_a_resumed_run_must_name_the_same_start(folder: Path, first: str, second: str, message: str) -> None:
    short = {**SETTINGS, "max_steps": 3, "eval_fraction": 0.0, "eval_on_start": None, "eval_strategy": None}
    output = f"one-{first}"
    if not (folder / output).exists():
        with contextlib.redirect_stdout(None):
            run_ranks(
                _alone, 1, finetune_options(folder, output, init_lora_weights=first, **short), init_process_group=False
            )
    argv = finetune_options(
        folder, "refused", init_lora_weights=second, resume_from_checkpoint=folder / output / "checkpoint-3"
    )
    with pytest.raises(SystemExit, match=message):
        finetune.main(argv)


def _alone(rank: int, world_size: int, argv: list[str]) -> None:
    finetune.main(argv)
