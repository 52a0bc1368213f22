"""The command line of the doctor."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from typing import TYPE_CHECKING

from ..command_line.fields import option as _option
from ..command_line.parse import parse_into_dataclasses
from ..methods.names import METHOD_NAMES

if TYPE_CHECKING:
    from ..methods.config import RefLoRAConfig

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
OPTIMIZERS = {"adamw": 2, "sgd": 0, "sgd-momentum": 1}
"""Number of state tensors of a factor's size, by optimizer. LoRA-RITE and LoRA-Muon are missing: they are methods."""


CONFIGS_HELP = (
    "DeepSpeed JSON or accelerate YAML; several of a kind are one per machine,\nand must agree; one of each are used "
    "together. None: DDP."
)


@dataclasses.dataclass(kw_only=True)
class DoctorOptions:
    """The doctor's options: the model, the adapter, the cluster and other settings that the files do not contain."""

    model: str | None = _option(
        None,
        "Hub name, path, config.json or smollm2. Only its configuration is read; without it, keys are checked only.",
    )
    method: str = _option("reflora", "Method.", choices=METHOD_NAMES)
    carry_moments: bool = _option(
        False, "Adam's moments become those of the method's coordinates (reflora after its warm-up, balora)."
    )
    tall_adapters: bool = _option(
        True, "Under FSDP and DeepSpeed: store lora_A as [in, r], as RefLoRACallback and finetune.py do."
    )
    load_in_4bit: bool = _option(False, "The base is kept in 4 bits, as by finetune.py --load_in_4bit.")
    lora_r: int = _option(16, "LoRA rank r.")
    target_modules: list[str] = _option(["all-linear"], "Layers that get an adapter.")  # noqa: RUF009
    target_parameters: list[str] = _option([], "Parameters of stacked experts that get one.")  # noqa: RUF009
    optim: str | None = _option(None, "Optimizer. Default: DeepSpeed's file's, or adamw.", choices=tuple(OPTIMIZERS))
    mixed_precision: str | None = _option(
        None, "Where the configuration leaves it to the trainer. Default: bf16.", choices=tuple(PRECISIONS)
    )
    micro_batch_size: int | None = _option(None, "Sequences per rank and backward pass. Default: the file's, or 1.")
    gradient_accumulation_steps: int | None = _option(None, "Default: the file's, or 1.")
    sequence_length: int = _option(512, "Tokens per sequence.")
    activation_checkpointing: bool = _option(False, "Keep each layer's input only and compute it again in backward.")
    attn_implementation: str | None = _option(None, "transformers' attention: eager, sdpa.")
    world_size: int | None = _option(None, "Ranks. Default: the launcher's, the file's, or this machine's GPUs.")
    num_nodes: int | None = _option(None, "Machines. Default: the launcher's, the file's, or 1.")
    gpu_memory_gib: float | None = _option(None, "Memory of each device. Default: that of this machine's GPU.")
    host_memory_gib: float | None = _option(None, "Memory of each machine, for what is offloaded.")
    bandwidth_gbit: float | None = _option(None, "Gbit/s at which a rank sends, for the times.")
    json: bool = _option(False, "Print JSON.")

    def __post_init__(self) -> None:
        for name in ("lora_r", "sequence_length", "micro_batch_size", "gradient_accumulation_steps", "world_size",
                     "num_nodes", "gpu_memory_gib", "host_memory_gib", "bandwidth_gbit"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} {value} must be a finite number above 0")
        if self.world_size and self.num_nodes and self.world_size % self.num_nodes:
            raise ValueError(f"--world_size {self.world_size} is not a multiple of --num_nodes {self.num_nodes}")
        self.reflora_config()

    def reflora_config(self) -> RefLoRAConfig:
        """Return the package's own configuration for this method."""
        from ..methods.config import RefLoRAConfig

        return RefLoRAConfig(method=self.method, carry_moments=self.carry_moments)


def parse_options(argv: list[str] | None = None) -> tuple[list[str], DoctorOptions]:
    """Parse the command line into the paths of the configuration files and the options.

    Raises:
        ValueError: an option has an unusable value.
    """
    from transformers import HfArgumentParser  # in a function, since --help prints DoctorOptions without it

    parser = HfArgumentParser(DoctorOptions, prog="python -m reflora_dist.doctor")  # type: ignore[arg-type]
    parser.add_argument(
        "configs",
        nargs="*",
        metavar="CONFIG",
        help=CONFIGS_HELP,
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options, rest = parse_into_dataclasses(parser, argv)
    return rest.configs, options


def launched() -> bool:
    """Return whether torchrun, accelerate or DeepSpeed launched this process: they set RANK and WORLD_SIZE.

    Raises:
        ValueError: only a part of a launcher's variables is set.
    """
    if not ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        return False
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"RANK is set but {name} is not: run this under torchrun, deepspeed or accelerate launch, or unset RANK"
            )
    return True
