"""What needs evaluations is refused by name where there are none; what is asked of accelerate reaches it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.trainer_pt_utils import AcceleratorConfig

from launchers import finetune
from launchers.training.arguments import _with_configured_state
from launchers.training.options import parse_options
from reflora_dist.checkpoints.complete import last_complete_checkpoint
from tests.support.cluster import run_ranks
from tests.support.finetune import finetune_options, finetune_rank
from tests.support.launchers import REPOSITORY, micro_model, write_records

RECORDS = "--dataset=records.jsonl"
HELD_OUT = "--eval_fraction=0.2"
CLASSIFICATION = ["--task=seq-cls", "--glue_task=mrpc", "--model=any"]
_NEEDS = [
    ("save_strategy=best", ["--save_strategy=best", "--metric_for_best_model=loss"]),
    ("lr_scheduler_type=reduce_lr_on_plateau", ["--lr_scheduler_type=reduce_lr_on_plateau"]),
    ("lr_scheduler_type=greedy", ["--lr_scheduler_type=greedy"]),
    ("load_best_model_at_end=True", ["--load_best_model_at_end=True"]),
    ("load_best_model_at_end=True", ["--load_best_model_at_end=True", "--save_strategy=no"]),
    ("metric_for_best_model=loss", ["--metric_for_best_model=loss"]),
    ("greater_is_better=False", ["--greater_is_better=False"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    micro_model(folder / "model")
    write_records(folder / "records.jsonl")
    return folder


@pytest.mark.parametrize(
    "without",
    [[RECORDS], [RECORDS, HELD_OUT, "--eval_strategy=no"], [*CLASSIFICATION, RECORDS], ["--eval_strategy=no"]],
    ids=["no-records", "not-asked", "classification", "embedded-not-asked"],
)
@pytest.mark.parametrize(("named", "options"), _NEEDS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_needs_evaluations_is_refused_by_name(named: str, options: list[str], without: list[str]) -> None:
    with pytest.raises(SystemExit, match=f"finetune.py: error: {named} needs evaluations .*: give --eval_dataset or"):
        finetune.main([*without, *options])


@pytest.mark.parametrize("option", ["eval_strategy=steps", "eval_strategy=epoch", "eval_on_start=True"])
@pytest.mark.parametrize("task", [[], CLASSIFICATION])
def test_an_evaluation_that_is_asked_for_needs_records(option: str, task: list[str]) -> None:
    with pytest.raises(SystemExit, match=f"{option}: there are no records to evaluate on; give --eval_dataset or"):
        finetune.main([*task, RECORDS, f"--{option}"])
    with pytest.raises(SystemExit, match="max_eval_records=3: there are no records to evaluate on"):
        finetune.main([*task, RECORDS, "--max_eval_records=3"])


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ([RECORDS], "no"),
        ([RECORDS, HELD_OUT], "steps"),
        ([RECORDS, "--eval_dataset=held_out.jsonl"], "steps"),
        ([], "steps"),  # the embedded records bring their own
        ([*CLASSIFICATION, RECORDS], "no"),
        (CLASSIFICATION, "steps"),  # and so does the hub's GLUE
        ([RECORDS, HELD_OUT, "--eval_strategy=epoch"], "epoch"),
        ([RECORDS, "--eval_strategy=no"], "no"),
    ],
)
def test_evaluations_are_the_default_where_there_are_records(options: list[str], strategy: str) -> None:
    """Before transformers checks what needs them, and not afterwards."""
    assert parse_options(options).training.eval_strategy == strategy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load_in_4bit=True", "--bf16_full_eval=True"], "bf16_full_eval=True would cast the packed weights"),
        (["--load_in_4bit=True", "--bf16=True", "--fp16_full_eval=True"], "fp16_full_eval=True would cast the packed"),
        (["--method=lora-rite", "--optim=adafactor"], "optim=adafactor means nothing to --method lora-rite"),
        (["--method=lora-rite", "--adam_epsilon=1e-5"], r"adam_epsilon=1e-05 means .* give --optim_args eps="),
        (["--method=lora-muon", "--optim=adafactor"], "optim=adafactor means nothing to --method lora-muon"),
        (["--method=lora-muon", "--adam_epsilon=1e-5"], r"adam_epsilon=1e-05 means .*: drop it"),
        (["--method=lora-muon", "--optim_args=eps=1"], "optim_args='eps=1': .*unexpected keyword argument 'eps'"),
    ],
)
def test_what_would_destroy_the_base_or_be_void_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        finetune.main(options)


def test_a_frequency_of_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_options([RECORDS, HELD_OUT, "--eval_steps=5"])
        assert "void" not in caplog.text
        parse_options([RECORDS, "--eval_steps=5"])
    assert "eval_steps=5 is void: there are no records to evaluate on" in caplog.text


@pytest.mark.parametrize(
    ("task", "known", "unknown"),
    [([], ["loss", "eval_loss"], "accuracy"), (CLASSIFICATION, ["loss", "f1", "eval_accuracy"], "pearson")],
)
def test_the_best_model_is_by_a_metric_of_the_task(task: list[str], known: list[str], unknown: str) -> None:
    """transformers would look for it at the first evaluation."""
    for name in known:
        parse_options([*task, f"--metric_for_best_model={name}"])
    with pytest.raises(ValueError, match=f"metric_for_best_model='{unknown}' is none of this task's: loss"):
        parse_options([*task, f"--metric_for_best_model={unknown}"])


@pytest.mark.parametrize("option", ["prediction_loss_only", "batch_eval_metrics"])
def test_metrics_that_could_not_be_computed_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{option}=True: the metrics of --task seq-cls are of all predictions"):
        finetune.main([*CLASSIFICATION, RECORDS, f"--output_dir={tmp_path}", f"--{option}=True"])


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"eval_delay": 7}, "eval_delay=7 is longer than the training of 6 steps"),
        (
            {"eval_delay": 1, "eval_strategy": "epoch", "max_steps": 4},
            "eval_delay=1 is longer than the training of 0.2",
        ),
    ],
    ids=["steps", "epoch"],
)
def test_evaluations_that_would_come_too_late_are_refused(folder: Path, changes: dict[str, Any], length: str) -> None:
    changes |= {"save_strategy": "best", "metric_for_best_model": "loss"}
    with pytest.raises(SystemExit, match=f"save_strategy=best needs evaluations, but {length}"):
        finetune.main(finetune_options(folder, "late", **changes))
    assert not list((folder / "late").glob("checkpoint-*"))


def _best(rank: int, world_size: int, argv: list[str]) -> None:
    finetune_rank(rank, world_size, "ddp", argv)


@pytest.mark.parametrize("eval_strategy", ["steps", "epoch"])
def test_the_best_checkpoint_is_there_and_complete(folder: Path, eval_strategy: str) -> None:
    """That of the last step too, where an epoch ends as well."""
    changes = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": eval_strategy}
    changes |= {"eval_steps": 4, "max_steps": None, "num_train_epochs": 1, "load_best_model_at_end": True}
    output = folder / f"best-{eval_strategy}"
    run_ranks(_best, 2, finetune_options(folder, output.name, **changes), timeout=170, init_process_group=False)
    (state_file,) = sorted(output.glob("checkpoint-8/trainer_state.json"))
    best = json.loads(state_file.read_text())["best_model_checkpoint"]
    assert Path(best).name == "checkpoint-8"  # every evaluation is better than the one before
    assert Path(last_complete_checkpoint(output) or "").name == "checkpoint-8"


def _accelerator_settings(rank: int, world_size: int, config: str) -> tuple[Any, ...]:
    zero2 = REPOSITORY / "ds_configs" / "zero2.json"
    training = parse_options([f"--deepspeed={zero2}", f"--accelerator_config={config}", RECORDS]).training
    assert training.distributed_state.distributed_type == DistributedType.DEEPSPEED
    found = Trainer(model=torch.nn.Linear(1, 1), args=training).accelerator.dataloader_config
    return found.split_batches, found.even_batches, found.use_seedable_sampler, training.world_size


@pytest.mark.parametrize("in_a_file", [False, True])
def test_what_is_asked_of_accelerate_reaches_it_under_deepspeed_on_a_cpu(tmp_path: Path, in_a_file: bool) -> None:
    config = json.dumps({"split_batches": True, "even_batches": False})
    if in_a_file:
        (tmp_path / "accelerator.json").write_text(config)
        config = str(tmp_path / "accelerator.json")
    assert run_ranks(_accelerator_settings, 2, config, init_process_group=False) == [(True, False, True, 2)] * 2


def test_every_form_of_an_accelerator_config_keeps_its_settings(tmp_path: Path) -> None:
    given = {"split_batches": True, "even_batches": False}
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert _with_configured_state(None) == {"use_configured_state": True}
    assert _with_configured_state(given) == {**given, "use_configured_state": True}
    assert json.loads(_with_configured_state(json.dumps(given))) == {**given, "use_configured_state": True}
    for form in (AcceleratorConfig(**given), str(tmp_path / "config.json")):
        found = _with_configured_state(form)
        found = found if isinstance(found, AcceleratorConfig) else AcceleratorConfig(**found)
        assert (found.split_batches, found.even_batches, found.use_configured_state) == (True, False, True)
    for wrong in ('{"split_batches": ', str(tmp_path / "absent.json")):
        with pytest.raises(ValueError, match=r"accelerator_config=.* is neither JSON nor a file of it"):
            _with_configured_state(wrong)
