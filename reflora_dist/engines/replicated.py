"""The engine for one process, DDP, FSDP1 NO_SHARD and adapters left out of sharding: every rank holds the factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..algebra.types import SIDE_A, SIDE_B
from ..collectives.tiling import Layout
from .pairs import AdapterPair
from .parameters import ParameterEngine


class ReplicatedEngine(ParameterEngine):
    """The engine if every rank holds the factors whole.

    This is so in one process, under DDP and FSDP1 NO_SHARD, and for adapters that are left out of sharding.

    Raises:
        ValueError: the optimizer does not hold the factors, or a factor is sharded.
    """

    layout = "whole"

    def __init__(self, pairs: Sequence[AdapterPair], optimizer: torch.optim.Optimizer, name: str) -> None:
        super().__init__(pairs, optimizer)
        self.name = name
        self.resumes_on_other_ranks = self.has_peft_form = name != "fsdp1"
        self.state_dict_lacks_parameters = name == "fsdp1"  # NO_SHARD
        self._check_whole()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.replicas = dist.group.WORLD

    @property
    def state_name(self) -> str:
        """Name of the checkpoint format. One process uses DDP's: each rank of DDP holds what one process holds."""
        return "ddp" if self.name == "single" else self.name

    def require_wrapped(self, model: nn.Module) -> None:
        if self.name == "fsdp1":
            require_fsdp1(model)

    def layouts(self) -> list[Layout]:
        return [pair.whole(side) for pair in self.pairs for side in (SIDE_A, SIDE_B)]


def require_fsdp1(model: nn.Module) -> None:
    """Make sure that the model is FSDP1's wrapper.

    Raises:
        ValueError: the model is the bare one inside the wrapper.
    """
    if not isinstance(model, FullyShardedDataParallel):
        raise ValueError(f"pass the FullyShardedDataParallel model, not the bare {type(model).__name__}")
