"""Training arguments of finetune.py: transformers' own with defaults for LoRA fine-tuning, on CPUs too."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..cluster.extension_locks import speak_while_building
from ..cluster.waiting import told
from ..configurations import shipped_configuration
from .defaults import TrainingDefaults
from .evaluations import check_strategy


@dataclasses.dataclass
class FinetuneArguments(TrainingDefaults, TrainingArguments):  # type: ignore[misc]  # output_dir is never None here
    """transformers' TrainingArguments with the defaults of LoRA fine-tuning."""

    def __post_init__(self) -> None:
        self._check_deepspeed()
        self._check_full_eval()
        check_strategy(self)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        with told(f"waiting for all {launched} ranks to join at {address}" if launched > 1 else ""):
            if not torch.accelerator.is_available():
                self._prepare_cpu()
            super().__post_init__()
        if launched != self.world_size:
            raise ValueError(f"{launched} processes were launched, but {self.world_size} joined the process group")

    @property
    def _under_deepspeed(self) -> bool:
        return bool(self.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"

    def _check_deepspeed(self) -> None:
        if self._under_deepspeed:
            speak_while_building()
        if not isinstance(self.deepspeed, str) or self.deepspeed.lstrip().startswith("{"):
            return
        if not Path(self.deepspeed).is_file():
            try:
                self.deepspeed = str(shipped_configuration(self.deepspeed, suffix=".json"))
            except ValueError as error:
                raise ValueError(f"deepspeed={self.deepspeed!r}: no such file; {error}") from None
        if "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"deepspeed={self.deepspeed!r} needs a launcher: deepspeed --num_gpus N launchers/finetune.py ..."
            )

    def _check_full_eval(self) -> None:
        """Refuse an evaluation in 16 bits where it fails (FSDP) or makes all of the training 16-bit (DeepSpeed)."""
        by_fsdp = bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        for dtype in ("bf16", "fp16"):
            if not getattr(self, f"{dtype}_full_eval"):
                continue
            if by_fsdp:
                raise ValueError(f"{dtype}_full_eval=True: the parameters that FSDP shards cannot be cast; drop it")
            by_accelerate = not self.deepspeed and os.environ.get("ACCELERATE_MIXED_PRECISION") == dtype
            if self._under_deepspeed and not getattr(self, dtype) and not by_accelerate:
                raise ValueError(
                    f"{dtype}_full_eval=True: DeepSpeed trains and evaluates in one precision; give --{dtype} True, or "
                    f"drop --{dtype}_full_eval"
                )

    def _prepare_cpu(self) -> None:
        """Make accelerate count the ranks of a CPU run. Otherwise each rank would train alone on all the data.

        Under DeepSpeed this method joins the process group and names its backend. accelerate leaves DeepSpeed out if
        it knows only that it runs on a CPU.
        """
        self.use_cpu, self.dataloader_pin_memory = True, False
        if not self._under_deepspeed:
            return
        before = os.environ.get("ACCELERATE_USE_DEEPSPEED")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        try:
            PartialState(backend=self.ddp_backend or "gloo", timeout=datetime.timedelta(seconds=self.ddp_timeout))
        finally:
            if before is None:
                del os.environ["ACCELERATE_USE_DEEPSPEED"]
            else:
                os.environ["ACCELERATE_USE_DEEPSPEED"] = before
        self.accelerator_config = _with_configured_state(self.accelerator_config)


def _with_configured_state(config: Any) -> Any:
    """Return ``accelerator_config``, in any form that transformers takes, changed to use the group joined here.

    Raises:
        ValueError: the value is neither JSON nor a readable file.
    """
    wanted = {"use_configured_state": True}
    if isinstance(config, AcceleratorConfig):
        return dataclasses.replace(config, use_configured_state=True)
    if not isinstance(config, str):
        return {**(config or {}), **wanted}
    try:
        if config.startswith("{"):
            return json.dumps({**json.loads(config), **wanted})  # transformers converts the values
        return {**AcceleratorConfig.from_json_file(config).to_dict(), **wanted}
    except (OSError, ValueError) as error:
        raise ValueError(f"accelerator_config={config!r} is neither JSON nor a file of it: {error}") from error
