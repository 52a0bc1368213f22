"""Runs whose ranks share sequences: context parallelism under FSDP2, Ulysses under ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from accelerate.parallelism_config import ParallelismConfig


def ranks_of_a_sequence(arguments: Any) -> int:
    """Return how many ranks hold a part of each sequence; 1 if every rank has whole ones.

    Args:
        arguments: the training arguments. Their ``parallelism_config`` counts, or else what ``accelerate launch`` or
            the user set in ``PARALLELISM_CONFIG_CP_SIZE`` and ``PARALLELISM_CONFIG_SP_SIZE``, as accelerate reads it.
    """
    config = _sizes(arguments)
    return config.cp_size * config.sp_size


def _sizes(arguments: Any) -> Any:
    config = arguments.parallelism_config
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()
    return SimpleNamespace(cp_size=1, sp_size=1) if config is None else config


def check_shared_sequences(options: Any) -> None:
    """Refuse what needs whole sequences on a rank, if ranks share them.

    Raises:
        ValueError: packing, classification or LoRA-SB was asked for; or under Ulysses several sequences per rank, or a
            resumed run.
    """
    ranks, training = ranks_of_a_sequence(options.training), options.training
    if ranks == 1:
        return
    shared = f"{ranks} ranks share each sequence (parallelism_config)"
    if options.data.packing:
        raise ValueError(f"packing=True: {shared}, and attention does not keep packed examples apart; drop --packing")
    if options.classification.active:
        raise ValueError(f"task=seq-cls: {shared}, and a label belongs to a whole one; set cp_size and sp_size to 1")
    if options.lora.method == "lora-sb":
        raise ValueError(
            f"method='lora-sb': {shared}, and its start takes gradients of whole ones; use lora-xs or another method"
        )
    if _sizes(training).sp_size == 1:
        return
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(training, name) > 1:
            raise ValueError(
                f"{name}={getattr(training, name)}: {shared} by Ulysses, whose loader and transformers' loss agree on "
                f"one at a time; set --{name} 1, and --gradient_accumulation_steps for more"
            )
    if training.resume_from_checkpoint and not training.ignore_data_skip:
        raise ValueError(
            f"resume_from_checkpoint={training.resume_from_checkpoint!r}: {shared} by Ulysses, whose loader cannot "
            "pass over batches; give --ignore_data_skip True, and the data begin anew"
        )
