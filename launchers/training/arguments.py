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

from reflora_dist.files.open_files import read_json

from ..cluster.extension_locks import speak_while_building
from ..cluster.waiting import told
from ..configurations import shipped_configuration
from .defaults import TrainingDefaults
from .evaluations import check_strategy, shown


@dataclasses.dataclass
class FinetuneArguments(TrainingDefaults, TrainingArguments):  # type: ignore[misc]  # output_dir is never None here
    """transformers' TrainingArguments with the defaults of LoRA fine-tuning."""

    def __post_init__(self) -> None:
        # transformers changes some of them; what was asked for can be asked for again
        self._asked = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        self._check_deepspeed()
        if self.eval_on_start is None:
            self.eval_on_start = shown(self.eval_strategy) != "no"
        if self.bf16 is None:
            self.bf16 = self._bf16_by_default()
        self._check_full_eval()
        self._check_fp16()
        check_strategy(self)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        with told(f"waiting for all {launched} ranks to join at {address}" if launched > 1 else ""):
            if not torch.accelerator.is_available():
                self._prepare_cpu()
            super().__post_init__()
        if launched != self.world_size:
            raise ValueError(f"{launched} processes were launched, but {self.world_size} joined the process group")
        if self._asked["bf16"] is None and self.bf16 and self.process_index == 0:
            print("training in bf16, which this GPU has; --bf16 False trains in fp32", flush=True)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of every argument."""
        return {
            field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for field in dataclasses.fields(cls)
        }

    def changed_from_defaults(self) -> dict[str, Any]:
        """Return the arguments that were asked for and differ from the defaults, as they were asked for.

        Of the defaults that depend on device and data, ``bf16`` and ``eval_strategy`` are among them as they were
        chosen. A token of the hub is not.
        """
        defaults = self.defaults() | {"hub_token": self.hub_token}
        # transformers' parser gives None in place of an empty text
        changed = {n: shown(v) for n, v in self._asked.items() if v != defaults[n] and (v, defaults[n]) != (None, "")}
        return changed | {"bf16": bool(self.bf16), "eval_strategy": shown(self.eval_strategy)}

    def leave_out_first_evaluation(self) -> None:
        """Leave out the evaluation before the first step, as a resumed run does, unless it was asked for."""
        if self._asked["eval_on_start"] is None:
            self.eval_on_start = False

    def _bf16_by_default(self) -> bool:
        by_accelerate = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
        if self.use_cpu or self.fp16 or by_accelerate or not gpu_has_bf16():
            return False
        config = self.deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if self._under_deepspeed else None
        return config is None or takes_bf16(config)

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

    def _check_fp16(self) -> None:
        """Refuse fp16 on a CPU: accelerate has no loss scaling there, and few CPUs have DeepSpeed's instructions."""
        asked = self.fp16 or (os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16" and not self.bf16)
        if not asked or torch.accelerator.is_available():
            return
        if self._under_deepspeed:
            from deepspeed.accelerator import get_accelerator

            if get_accelerator().is_fp16_supported():
                return
        given = "fp16=True" if self.fp16 else "mixed_precision=fp16 in accelerate's configuration"
        raise ValueError(f"{given} needs a GPU, and there is none: give --bf16 True, or train in fp32 without it")

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


def gpu_has_bf16() -> bool:
    """Return whether this process has a GPU that computes in bf16, and does not emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def takes_bf16(config: Any) -> bool:
    """Return whether DeepSpeed's configuration trains in bf16, or leaves that to the arguments.

    Args:
        config: the configuration as a dictionary or JSON, or the path of its file. What cannot be read is left to
            DeepSpeed, which says what is wrong with it.
    """
    if isinstance(config, str):
        try:
            config = json.loads(config) if config.lstrip().startswith("{") else read_json(Path(config))
        except ValueError:
            return False
    enabled = {}
    for name in ("bf16", "fp16"):
        section = config.get(name) if isinstance(config, dict) else None
        enabled[name] = section.get("enabled", False) if isinstance(section, dict) else False
    return enabled["bf16"] in (True, "auto") and enabled["fp16"] is not True


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
