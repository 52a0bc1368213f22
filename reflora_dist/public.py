"""The public names of the package, which ``reflora_dist`` imports at the first use of one of them."""

from __future__ import annotations

from . import lora_sb  # which makes its adapters known to PEFT
from .callback import RefLoRACallback
from .engines.tall import tall_adapters
from .export.convert import convert_adapter
from .methods.config import RefLoRAConfig
from .starts.initialize import export_adapter, initialize_adapters, replay_initialization
from .step.handle import Handle, attach
from .step.muon_optimizer import LoRAMuon
from .step.report import Report
from .step.rite_optimizer import LoRARite

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
