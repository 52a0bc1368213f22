"""Every engine that RefLoRA is held to its reference on, by name.

`ENGINES` maps a name to an `Engine`, whose ``train`` runs it on the ranks of the current process group.
"""

from __future__ import annotations

from tests.engines_under_test import accelerated, fsdp, replicated, trainer, zero
from tests.engines_under_test.common import Engine

ENGINES: dict[str, Engine] = {
    engine.name: engine for module in (replicated, fsdp, zero, accelerated, trainer) for engine in module.ENGINES
}

__all__ = ["ENGINES", "Engine"]
