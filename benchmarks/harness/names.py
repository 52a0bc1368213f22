"""Names that options may have. They are known before torch is imported, so that ``--help`` needs no library."""

from __future__ import annotations

from reflora_dist.methods.names import LATENT_METHODS, METHOD_NAMES

# fsdp2, zero2 and zero3 store lora_A tall, the default for users; -flat as PEFT does; -shard1 too, cut by columns
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3", "fsdp2-flat", "zero2-flat", "zero3-flat", "fsdp2-shard1")
STEP_ENGINES = ("single", "ddp", "fsdp2", "fsdp2-flat", "fsdp2-shard1")
"""Engines under which the optimizer step of adapters alone can be measured, without a model to shard."""
BACKENDS = ("gloo", "nccl")
ALL_METHODS = (*METHOD_NAMES, *LATENT_METHODS)
MOMENTS = "+moments"  # behind a method's name: with carry_moments=True
SWEPT_METHODS = (*ALL_METHODS, f"reflora{MOMENTS}", f"balora{MOMENTS}")
