"""What command lines say of the methods. They say it before torch is imported, so no method is imported for it."""

from __future__ import annotations

import pkgutil
from pathlib import Path

_NO_METHODS = {"base", "config", "names", "reference", "registry"}
# The file of a method has its name, with "_" for "-". Plain LoRA comes first: comparisons start with it.
METHOD_NAMES = tuple(
    sorted(
        (
            module.name.replace("_", "-")
            for module in pkgutil.iter_modules([str(Path(__file__).parent)])
            if module.name not in _NO_METHODS
        ),
        key=lambda name: (name != "lora", name),
    )
)
LATENT_METHODS = ("lora-sb", "lora-xs")
"""Methods that train an r x r matrix between frozen factors: :mod:`reflora_dist.lora_sb`."""
DEFAULT_DAMPING = 1e-2
"""delta of "scaled-gd", as the default of PEFT's ``reg``."""
