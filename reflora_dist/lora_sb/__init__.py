"""LoRA-SB and LoRA-XS: adapters ``s B R A`` that train only R ``[r, r]``, under every engine.

Importing this package registers the adapter with PEFT, so that ``PeftModel.from_pretrained`` loads saved adapters.
Without the import PEFT raises ``KeyError: 'REFLORA_DIST_LORA_XS'``.
"""

from .callback import LoRASBCallback
from .config import METHODS, LoRASBConfig, LoraXSConfig
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
    "truncated_svd",
]
