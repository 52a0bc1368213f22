"""Plain LoRA (Hu et al., 2021, arXiv 2106.09685), for comparisons."""

from __future__ import annotations

from .base import Method


class LoRA(Method):
    """The method that changes nothing."""

    name = "lora"
    acts = False
