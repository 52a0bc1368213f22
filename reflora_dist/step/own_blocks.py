"""The blocks of an engine's pairs that this rank computes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..algebra.tall_blocks import BlockSet
from ..algebra.types import BlockSpec
from ..engines.base import Engine


def block_set(engine: Engine, specs: Sequence[BlockSpec], device: torch.device) -> BlockSet:
    """Return the set of blocks with the given places, of the engine's pairs."""
    lora_ranks, experts = [pair.lora_rank for pair in engine.pairs], [pair.experts for pair in engine.pairs]
    return BlockSet(specs, lora_ranks, device, experts=experts)
