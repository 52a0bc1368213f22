"""LoRA with geometry for sharded training: RefLoRA and its relatives under DDP, FSDP and DeepSpeed ZeRO.

``attach(model, optimizer, RefLoRAConfig(...))`` in a training loop of your own, or ``RefLoRACallback`` in HF Trainer.
"""

import sys

from . import lora_sb  # which makes its adapters known to PEFT
from .callback import RefLoRACallback
from .checkpoints import complete, training_state
from .engines.tall import tall_adapters
from .export.convert import convert_adapter
from .methods.config import RefLoRAConfig
from .starts.initialize import export_adapter, initialize_adapters, replay_initialization
from .step.handle import Handle, attach
from .step.muon_optimizer import LoRAMuon
from .step.report import Report
from .step.rite_optimizer import LoRARite

# The names under which release 0.1 documented these modules.
sys.modules[f"{__name__}.checkpoint"] = training_state
sys.modules[f"{__name__}.completeness"] = complete

__version__ = "0.1.0"
__all__ = [
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
