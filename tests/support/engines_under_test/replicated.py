"""Engines in which every rank holds whole factors: one process and DDP."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.support.engines_under_test.common import Engine, Wrapped, optimizer_of
from tests.support.workloads import Settings


class _Ddp(Wrapped):
    def accumulation_context(self, is_last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if is_last else self.model.no_sync()


def _single(model: nn.Module, settings: Settings, micro_batch_size: int) -> Wrapped:
    return Wrapped(model, optimizer_of(model, settings), settings)


def _ddp(model: nn.Module, settings: Settings, micro_batch_size: int) -> Wrapped:
    wrapped = DistributedDataParallel(model)
    return _Ddp(wrapped, optimizer_of(wrapped, settings), settings, bare=model)


ENGINES = [Engine("single", _single, world_sizes=(1,)), Engine("ddp", _ddp)]
