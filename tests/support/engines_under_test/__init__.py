"""Every engine that RefLoRA is held to its reference on, by name.

`ENGINES` maps a name to an `Engine`, whose ``train`` runs it on the ranks of the current process group.
"""

from __future__ import annotations

from tests.support.engines_under_test import (
    accelerated,
    context_parallel,
    fsdp,
    replicated,
    trainer,
    ulysses,
    zero,
)
from tests.support.engines_under_test.common import Engine

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for module in (replicated, fsdp, zero, ulysses, accelerated, context_parallel, trainer)
    for engine in module.ENGINES
}

# Their lora_A is sharded by columns, which one that is stored tall has not.
WITHOUT_TALL = ("fsdp2-shard1", "fsdp2-hsdp-shard1")

__all__ = ["ENGINES", "WITHOUT_TALL", "Engine"]
