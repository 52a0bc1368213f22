"""The engines as Hugging Face's ``Trainer`` and TRL's ``SFTTrainer`` drive them; the method comes as a callback."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from tests.support.engines_under_test.accelerated import (
    forget_accelerate,
    fsdp_on_cpu,
    gathered,
    prepare_deepspeed_on_cpu,
)
from tests.support.engines_under_test.common import DEVICE, Engine, Trained, mean_over_ranks, on_the_host, world_size
from tests.support.engines_under_test.fsdp import assert_fsdp1_shards, assert_fsdp2_shards
from tests.support.engines_under_test.zero import assert_zero_shards, zero_config
from tests.support.workloads import Settings

_FSDP_CONFIG = {
    1: {"version": 1, "reshard_after_forward": "full_shard", "sync_module_states": False},
    2: {"version": 2, "reshard_after_forward": True},
}


class Recording(Trainer):
    """Keeps every micro-batch's loss (``Trainer``'s log rounds them) and checks how the model was sharded."""

    assert_sharded: Callable[[Any], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_losses: list[float] = []

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self.micro_losses:
            self.assert_sharded(model)
        loss = super().training_step(model, *args, **kwargs)
        self.micro_losses.append(loss.item())
        return loss


class RecordingSFTTrainer(Recording, SFTTrainer):
    """TRL's, which computes the loss itself; on rows that are tokens already, and never padded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = {f"token_{index}": index for index in range(8)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, "token_0")), pad_token="token_0", eos_token="token_1"
        )
        super().__init__(*args, processing_class=tokenizer, **kwargs)


def _cpu_arguments(settings: Settings, micro_batch_size: int) -> dict[str, Any]:
    return {"use_cpu": DEVICE.type == "cpu"}


@dataclasses.dataclass(frozen=True)
class TrainerEngine(Engine):
    """An engine whose ``train`` takes a ``TrainerCallback`` (or None) instead of an attach function."""

    arguments: Callable[[Settings, int], dict[str, Any]] = _cpu_arguments
    assert_sharded: Callable[[Any], None] = lambda model: None
    sft: bool = False
    takes_callback = True

    def train(
        self,
        model: nn.Module,
        batches: Tensor,
        settings: Settings,
        attach: TrainerCallback | None = None,
        *,
        hand_over_bare: bool = False,
    ) -> Trained:
        """One optimizer step per global batch, in order. Trainer itself decides which model a callback sees."""
        trainer = self.trainer(model, batches, settings, [] if attach is None else [attach])
        trainer.train()
        per_step = zip(*[iter(trainer.micro_losses)] * settings.grad_accum, strict=True)
        # Trainer's loss of a micro-batch is divided by their number already
        losses = mean_over_ranks([sum(step) for step in per_step])
        return losses, on_the_host(gathered(trainer.accelerator, trainer.model_wrapped))

    def trainer(
        self,
        model: nn.Module,
        batches: Tensor,
        settings: Settings,
        callbacks: list[TrainerCallback],
        **arguments: Any,
    ) -> Recording:
        """The trainer that `train` runs, for tests that save, resume and log; further arguments are its own."""
        forget_accelerate()
        steps, global_batch, _ = batches.shape
        micro_batch_size = global_batch // (world_size() * settings.grad_accum)
        rows = [{"input_ids": row, "labels": row} for row in batches.flatten(0, 1).tolist()]
        with fsdp_on_cpu():
            trainer = (RecordingSFTTrainer if self.sft else Recording)(
                model=model,
                args=self._arguments(settings, steps, micro_batch_size, **arguments),
                train_dataset=Dataset.from_list(rows) if self.sft else rows,
                data_collator=None if self.sft else default_data_collator,
                callbacks=callbacks,
                optimizer_cls_and_kwargs=settings.own_optimizer(),
            )
        assert trainer.accelerator.num_processes == world_size()
        trainer.assert_sharded = self.assert_sharded
        return trainer

    def _arguments(self, settings: Settings, steps: int, micro_batch_size: int, **others: Any) -> TrainingArguments:
        # what SFTConfig sets otherwise than TrainingArguments
        plain = {"bf16": False, "gradient_checkpointing": False, "logging_steps": 500} if self.sft else {}
        arguments = {
            "output_dir": tempfile.gettempdir(),
            "per_device_train_batch_size": micro_batch_size,
            "gradient_accumulation_steps": settings.grad_accum,
            "max_steps": steps,
            "train_sampling_strategy": "sequential",
            "optim": "adamw_torch",
            "learning_rate": settings.lr,
            "lr_scheduler_type": "constant",
            "weight_decay": settings.weight_decay,
            "adam_beta1": settings.betas[0],
            "adam_beta2": settings.betas[1],
            "adam_epsilon": settings.eps,
            "max_grad_norm": settings.clip,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **plain,
            **self.arguments(settings, micro_batch_size),
            **others,
        }
        return (SFTConfig if self.sft else TrainingArguments)(**arguments)


def _not_used(model: nn.Module, settings: Settings, micro_batch_size: int) -> Any:
    raise AssertionError("the trainer wraps the model")


def _fsdp_arguments(settings: Settings, micro_batch_size: int, *, version: int) -> dict[str, Any]:
    return {"use_cpu": DEVICE.type == "cpu", "fsdp": True, "fsdp_config": dict(_FSDP_CONFIG[version])}


def _zero_arguments(settings: Settings, micro_batch_size: int, *, stage: int) -> dict[str, Any]:
    prepare_deepspeed_on_cpu()
    config = zero_config(settings, micro_batch_size, stage)
    return {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}


def _assert_ddp(model: Any) -> None:
    assert isinstance(model, DistributedDataParallel)


def _engines(kind: str, sft: bool) -> list[TrainerEngine]:
    engine = functools.partial(TrainerEngine, wrap=_not_used, sft=sft)
    return [
        engine(f"ddp-{kind}", assert_sharded=_assert_ddp),
        *(
            engine(
                f"fsdp{version}-{kind}",
                arguments=functools.partial(_fsdp_arguments, version=version),
                assert_sharded=check,
            )
            for version, check in ((1, assert_fsdp1_shards), (2, assert_fsdp2_shards))
        ),
        *(
            engine(
                f"zero{stage}-{kind}",
                arguments=functools.partial(_zero_arguments, stage=stage),
                assert_sharded=functools.partial(assert_zero_shards, stage=stage),
            )
            for stage in (1, 2, 3)
        ),
    ]


ENGINES = [*_engines("trainer", sft=False), *_engines("sft", sft=True)]
