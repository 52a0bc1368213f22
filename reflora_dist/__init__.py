"""RefLoRA for sharded training: refactored LoRA gradients under DDP, FSDP and DeepSpeed ZeRO.

``attach(model, optimizer, RefLoRAConfig(...))`` in a training loop of your own, or ``RefLoRACallback`` in HF Trainer.
"""

from .callback import RefLoRACallback
from .config import RefLoRAConfig
from .integrate import Handle, attach
from .lora_rite import LoRARite
from .report import Report

__version__ = "0.1.0"
__all__ = ["Handle", "LoRARite", "RefLoRACallback", "RefLoRAConfig", "Report", "attach"]
