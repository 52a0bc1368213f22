"""Runs whose ranks share sequences: context parallelism under FSDP2, Ulysses under ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import os
from typing import Any

from accelerate.parallelism_config import ParallelismConfig


def ranks_of_a_sequence(arguments: Any) -> int:
    """Return how many ranks hold a part of each sequence; 1 if every rank has whole ones.

    Args:
        arguments: the training arguments. Their ``parallelism_config``, or else what ``accelerate launch`` or the user
            set in ``PARALLELISM_CONFIG_CP_SIZE`` and ``PARALLELISM_CONFIG_SP_SIZE``, as accelerate reads it.
    """
    config = arguments.parallelism_config
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()
    return 1 if config is None else config.cp_size * config.sp_size


def check_shared_sequences(options: Any) -> None:
    """Refuse what needs whole sequences on a rank, if ranks share them.

    Raises:
        ValueError: packing, classification or LoRA-SB was asked for.
    """
    ranks = ranks_of_a_sequence(options.training)
    if ranks == 1:
        return
    shared = f"{ranks} ranks share each sequence (parallelism_config)"
    if options.data.packing:
        raise ValueError(f"packing=True: {shared}, and their attention does not keep packed examples apart; drop it")
    if options.classification.active:
        raise ValueError(f"task=seq-cls: {shared}, and a label belongs to a whole one; set cp_size and sp_size to 1")
    if options.lora.method == "lora-sb":
        raise ValueError(
            f"method='lora-sb': {shared}, and its start takes gradients of whole ones; use lora-xs or another method"
        )
