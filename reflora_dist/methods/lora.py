"""LoRA (Hu et al., 2021, arXiv 2106.09685): training as it is, for comparisons."""

from __future__ import annotations

from .base import Method


class LoRA(Method):
    """Does nothing."""

    name = "lora"
    acts = False
