"""LoRA-SB and LoRA-XS: adapters ``s B R A`` of which only R ``[r, r]`` is trained, under every engine.

Importing this makes the adapter known to PEFT: ``PeftModel.from_pretrained`` loads what was saved. Where it is not
imported PEFT stops with ``KeyError: 'REFLORA_DIST_LORA_XS'``.
"""

from .callback import LoRASBCallback
from .config import METHODS, LoRASBConfig, LoraXSConfig
from .convert import save_as_lora
from .initialize import initialize_lora_sb, initialize_lora_xs
from .layer import LoraXSLinear
from .svd import truncated_svd
from .tuner import LoraXSModel

__all__ = [
    "METHODS",
    "LoRASBCallback",
    "LoRASBConfig",
    "LoraXSConfig",
    "LoraXSLinear",
    "LoraXSModel",
    "initialize_lora_sb",
    "initialize_lora_xs",
    "save_as_lora",
    "truncated_svd",
]
