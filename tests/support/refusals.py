"""The error that an attempt ends with, as text that ranks can return."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reflora_dist import RefLoRAConfig
from tests.support.engines_under_test.common import trainable

CONFIG = RefLoRAConfig(method="reflora", warmup_steps=0)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-3)


def message_of(attempt: Any) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
