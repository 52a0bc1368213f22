"""RefLoRA for sharded training: refactored LoRA gradients under DDP, FSDP and DeepSpeed ZeRO.

``attach(model, optimizer, RefLoRAConfig(...))`` in a training loop of your own, or ``RefLoRACallback`` in HF Trainer.
"""

from .callback import RefLoRACallback
from .config import RefLoRAConfig
from .initialization import convert_adapter, export_adapter, initialize_adapters, replay_initialization
from .integrate import Handle, attach
from .report import Report

__version__ = "0.1.0"
__all__ = [
    "Handle",
    "RefLoRACallback",
    "RefLoRAConfig",
    "Report",
    "attach",
    "convert_adapter",
    "export_adapter",
    "initialize_adapters",
    "replay_initialization",
]
