"""The optimizers of methods that are optimizers, by the method's name."""

from __future__ import annotations

from .factor_optimizer import FactorOptimizer
from .muon_optimizer import LoRAMuon
from .rite_optimizer import LoRARite

METHOD_OPTIMIZERS: dict[str, type[FactorOptimizer]] = {kind.method: kind for kind in (LoRAMuon, LoRARite)}
