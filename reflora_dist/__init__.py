"""RefLoRA and related LoRA methods for sharded training, under DDP, FSDP and DeepSpeed ZeRO.

``attach(model, optimizer, RefLoRAConfig(...))`` in a training loop of your own, or ``RefLoRACallback`` in HF Trainer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .public import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [  # noqa: F405
    "Handle",
    "LoRAMuon",
    "LoRARite",
    "RefLoRACallback",
    "RefLoRAConfig",
    "Report",
    "attach",
    "convert_adapter",
    "export_adapter",
    "initialize_adapters",
    "lora_sb",
    "replay_initialization",
    "tall_adapters",
]


def __getattr__(name: str) -> Any:
    """Import the public names at the first use of one: commands print their help before torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import public

    return getattr(public, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
