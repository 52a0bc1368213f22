"""One process, DDP, FSDP1 NO_SHARD, or adapters that are left out of sharding: every rank holds the factors whole."""

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
    """One process, DDP, FSDP1 NO_SHARD, or adapters that are left out of sharding: every rank holds all."""

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
        """Every rank of DDP holds what one process holds."""
        return "ddp" if self.name == "single" else self.name

    def require_wrapped(self, model: nn.Module) -> None:
        if self.name == "fsdp1":
            require_fsdp1(model)

    def layouts(self) -> list[Layout]:
        return [pair.whole(side) for pair in self.pairs for side in (SIDE_A, SIDE_B)]


def require_fsdp1(model: nn.Module) -> None:
    """Raises ValueError for the bare model inside FSDP1's."""
    if not isinstance(model, FullyShardedDataParallel):
        raise ValueError(f"pass the FullyShardedDataParallel model, not the bare {type(model).__name__}")
