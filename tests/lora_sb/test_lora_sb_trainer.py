"""LoRA-SB in HF Trainer: the callback initializes from the Trainer's batches, and checkpoints resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from reflora_dist.checkpoints.training_state import save_adapter
from reflora_dist.lora_sb import LoRASBCallback, LoRASBConfig
from tests.support.checkpoints import assert_no_frozen_base
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test import trainer as trainer_engines
from tests.support.engines_under_test.common import mean_over_ranks
from tests.support.lora_xs import base_model, xs_model
from tests.support.workloads import synthetic_workload

STEPS, SAVE_STEPS, WORLD_SIZE = 4, 2, 2
CONFIG = LoRASBConfig(num_batches=4)  # of 2 micro-batches per step: the first two steps' samples
# one ulp of a reduction; A or B that are not restored change everything
TOLERANCE = 1e-6


class Outcome(NamedTuple):
    """The adapter at the end, and the micro-batches' losses."""

    adapter: dict[str, Tensor]
    losses: list[float]


def _train(
    rank: int, world_size: int, engine_name: str, method: str, output_dir: str, resume_from: str | None = None
) -> Outcome:
    for version in (1, 2):
        trainer_engines._FSDP_CONFIG[version]["state_dict_type"] = "SHARDED_STATE_DICT"
    workload = synthetic_workload(steps=STEPS)
    settings = dataclasses.replace(workload.settings, clip=0.5, grad_accum=2)
    callback = LoRASBCallback(dataclasses.replace(CONFIG, method=method))
    trainer = ENGINES[engine_name].trainer(xs_model(workload), workload.batches, settings, [callback])
    trainer.args.output_dir = output_dir
    trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, SAVE_STEPS
    trainer.args.train_sampling_strategy = "random"
    trainer.train(resume_from_checkpoint=resume_from)
    save_adapter(trainer.model_wrapped, f"{output_dir}/end")
    adapter = load_file(f"{output_dir}/end/adapter_model.safetensors")
    return Outcome(adapter, mean_over_ranks(trainer.micro_losses))


def _cases() -> Iterator[Any]:
    default = {("ddp-trainer", "lora-sb"), ("fsdp2-trainer", "lora-sb"), ("zero3-trainer", "lora-sb")}
    default |= {("fsdp1-trainer", "lora-sb"), ("zero2-trainer", "lora-xs")}
    for engine in ("ddp-trainer", "fsdp1-trainer", "fsdp2-trainer", "zero1-trainer", "zero2-trainer", "zero3-trainer"):
        for method in ("lora-sb", "lora-xs"):
            marks = [] if (engine, method) in default else [pytest.mark.all_ranks]
            yield pytest.param(engine, method, marks=marks, id=f"{engine}-{method}")


@pytest.mark.parametrize(("engine_name", "method"), _cases())
def test_trainer_initializes_saves_and_resumes(engine_name: str, method: str, tmp_path: Path) -> None:
    """The checkpoint is an adapter that PEFT loads, with no weight of the base; resumed from it, with other A and B at
    first, losses and adapter are those of the whole run, whose data begin with the batches that it was initialized
    from.
    """
    whole = run_ranks(_train, WORLD_SIZE, engine_name, method, str(tmp_path))[0]
    written = tmp_path / f"checkpoint-{SAVE_STEPS}"
    assert_no_frozen_base(written)
    saved = load_file(written / "adapter_model.safetensors")
    for key, tensor in whole.adapter.items():
        assert saved[key].shape == tensor.shape
        assert (".lora_xs_R." in key) != torch.equal(saved[key], tensor), key
    loaded = PeftModel.from_pretrained(base_model(synthetic_workload(steps=1)), written)
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[key.replace(".weight", ".default.weight")], saved[key]) for key in saved)
    resumed = run_ranks(_train, WORLD_SIZE, engine_name, method, str(tmp_path), str(written))[0]
    for key, tensor in whole.adapter.items():
        assert _error(resumed.adapter[key], tensor) <= TOLERANCE, key
    for loss, expected in zip(resumed.losses, whole.losses[2 * SAVE_STEPS :], strict=True):
        assert abs(loss - expected) <= TOLERANCE * expected


def test_the_first_learning_rate_is_that_of_the_warm_up() -> None:
    """Without one in the configuration the first step has the peak rate divided by the warm-up's steps."""
    arguments = TrainingArguments(learning_rate=3e-4, warmup_steps=0.1, use_cpu=True)
    callback = LoRASBCallback({"num_batches": 1})
    assert callback.first_learning_rate(arguments, TrainerState(max_steps=60)) == pytest.approx(3e-4 / 6)
    arguments = TrainingArguments(learning_rate=3e-4, use_cpu=True)
    assert callback.first_learning_rate(arguments, TrainerState(max_steps=60)) == 3e-4
    callback = LoRASBCallback(LoRASBConfig(learning_rate=0.5))
    assert callback.first_learning_rate(arguments, TrainerState(max_steps=60)) == 0.5


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
