"""What the callbacks say, and leave behind, in a Trainer on one process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

from reflora_dist import RefLoRACallback, RefLoRAConfig
from reflora_dist.checkpoints.complete import CompleteCheckpoints, saved_checkpoints
from reflora_dist.checkpoints.trainer_folders import checkpoint_folder
from reflora_dist.lora_sb import LoRASBCallback, LoRASBConfig, LoraXSConfig

STEPS = 4


def _trained(
    folder: Path,
    adapter: Any,
    *callbacks: TrainerCallback,
    times: int = 1,
    resume: str | None = None,
    **settings: Any,
) -> Trainer:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)), adapter)
    tokens = torch.arange(64).view(8, 8).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    defaults = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": STEPS}
    arguments = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=2, **{**defaults, **settings})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    for _ in range(times):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def _lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear")


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        (RefLoRAConfig(), None),  # a tenth of the steps, and at least one
        (
            RefLoRAConfig(warmup_steps=100),
            "begins after warmup_steps=100 and training ends after 4: all of it is plain",
        ),
        (RefLoRAConfig(warmup_steps=STEPS), "begins after warmup_steps=4"),
        (RefLoRAConfig(warmup_steps=STEPS - 1), None),
        (RefLoRAConfig(method="lora"), None),
    ],
    ids=["default", "longer", "as-long", "one-step", "lora"],
)
def test_a_run_within_the_warm_up_is_named(
    config: RefLoRAConfig, warning: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "reflora_dist"):
        _trained(tmp_path, _lora(), RefLoRACallback(config))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (warning is not None), messages
    assert warning is None or warning in messages[0]


@pytest.mark.parametrize(
    ("steps", "warmup_steps"), [(1, 1), (10, 1), (11, 2), (50, 5), (1000, 100), (1001, 100), (10**6, 100)]
)
def test_a_default_warm_up_is_at_most_a_tenth_of_the_training(steps: int, warmup_steps: int) -> None:
    for method in ("reflora", "reflora-s", "lora-pro"):
        assert RefLoRAConfig(method=method).for_steps(steps).warmup_steps == warmup_steps
        given = RefLoRAConfig(method=method, warmup_steps=100)
        assert given.for_steps(steps) == given == RefLoRAConfig(method=method)
    for method in ("lora", "scaled-gd", "lora-rite"):
        assert RefLoRAConfig(method=method).for_steps(steps).warmup_steps == 0


def test_a_resumed_run_keeps_its_warm_up_if_its_length_changes(tmp_path: Path) -> None:
    first = RefLoRACallback(RefLoRAConfig())
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": 12}
    _trained(tmp_path, _lora(), first, **saving)
    assert (first.config.warmup_steps, first.report().applied_steps) == (2, 10)
    second, checkpoint = RefLoRACallback({"method": "reflora"}), str(tmp_path / "checkpoint-12")
    _trained(tmp_path, _lora(), second, resume=checkpoint, **{**saving, "max_steps": 50})
    assert (second.config.warmup_steps, second.report().applied_steps) == (2, 48)
    third = RefLoRACallback(RefLoRAConfig(warmup_steps=40))
    _trained(tmp_path, _lora(), third, resume=checkpoint, **{**saving, "max_steps": 50})
    assert (third.config.warmup_steps, third.report().applied_steps) == (40, 20)


def test_a_callback_that_trains_twice_counts_each_time(tmp_path: Path) -> None:
    callback = RefLoRACallback(RefLoRAConfig())
    for steps, warmup_steps in ((11, 2), (4, 1)):
        _trained(tmp_path, _lora(), callback, max_steps=steps)
        assert callback.config.warmup_steps == warmup_steps


def test_a_run_that_skipped_every_adapter_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """lora_B is zero at its only step, so S exists nowhere."""
    with caplog.at_level(logging.WARNING, "reflora_dist"):
        _trained(tmp_path, _lora(), RefLoRACallback(RefLoRAConfig(warmup_steps=0)), max_steps=1)
    assert "reflora skipped every adapter in each of its 1 steps" in caplog.text


@pytest.mark.parametrize(("stopped", "left"), [(False, {"checkpoint-1"}), (True, {"checkpoint-1", "checkpoint-3"})])
def test_one_checkpoint_is_left_of_a_run_that_ended(stopped: bool, left: set[str], tmp_path: Path) -> None:
    """The best one; but what was stopped goes on from its last. The arguments are as they were."""

    class Best(TrainerCallback):
        """The first evaluation is the best; stops after step 3, or not."""

        def on_evaluate(self, *args: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            metrics["eval_loss"] = args[1].global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = stopped and state.global_step == 3

    trainer = _trained(
        *(tmp_path, _lora(), RefLoRACallback(RefLoRAConfig(warmup_steps=1)), Best(), CompleteCheckpoints()),
        save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, learning_rate=0.0,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint is not None
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
    assert trainer.args.save_total_limit == 1


def test_no_folder_of_another_name_is_removed(tmp_path: Path) -> None:
    """Trainer would take every checkpoint-* for one of its own, and remove the oldest."""
    kept = [tmp_path / name / "adapter.txt" for name in ("checkpoint-best", "checkpoint-1-copy", "checkpoint-99")]
    for path in kept:
        path.parent.mkdir()
        path.write_text("mine")
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    _trained(tmp_path, _lora(), RefLoRACallback(RefLoRAConfig()), CompleteCheckpoints(), **saving)
    assert all(path.read_text() == "mine" for path in kept)
    assert [path.name for path in saved_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_a_search_whose_folders_callbacks_are_not_told(tmp_path: Path) -> None:
    state = TrainerState(is_hyper_param_search=True)
    with pytest.raises(RuntimeError, match="save_strategy='no'"):
        checkpoint_folder(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state)


@pytest.mark.parametrize("method", ["lora-xs", "lora-sb"])
def test_a_second_training_goes_on(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Initializing again would throw the first one's result away."""
    callback = LoRASBCallback(LoRASBConfig(method=method, num_batches=1))
    trained: list[torch.Tensor] = []

    class Watching(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trained.append(torch.cat([p.detach().flatten() for p in kwargs["model"].parameters() if p.requires_grad]))

        on_train_end = on_train_begin

    adapter = LoraXSConfig(r=4, target_modules=["q_proj"])
    _trained(tmp_path, adapter, callback, Watching(), times=2, learning_rate=0.1)
    first, end, second, _ = trained
    assert not torch.equal(first, end) and torch.equal(second, end)
    assert "training goes on from what they are" in caplog.text
