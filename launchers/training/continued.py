"""``--model ADAPTER``: train an adapter further, on the base that it names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from reflora_dist.checkpoints.adapter_files import load_adapter
from reflora_dist.checkpoints.embeddings import resize_for
from reflora_dist.checkpoints.start_file import changes_base, saved_mark
from reflora_dist.engines.bare_base import adapter_folder
from reflora_dist.files.open_files import read_peft_config, read_tensors
from reflora_dist.files.other_files import tokenizer_files
from reflora_dist.files.stored_weights import find_model

from ..evaluation.generation import base_of
from .options import Options

# options that determine the adapter's function, by the fields of its configuration
_OPTIONS = {"r": "lora_r", "lora_alpha": "lora_alpha", "use_rslora": "rslora", "use_dora": "dora"}
# layers are compared by their tensors, when the adapter is loaded; the other fields do not change the function
_OTHERS = {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"} | {
    "modules_to_save", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "init_lora_weights", "fan_in_fan_out", "ensure_weight_tying", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "peft_version",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ContinuedAdapter:
    """An adapter that is trained further.

    Attributes:
        folder: the folder with its files.
        base: hub name or folder of the base that its configuration names.
    """

    folder: Path
    base: str

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer is: in its own folder if that has one, else at the base."""
        return str(self.folder) if tokenizer_files(self.folder) else self.base

    def resize(self, base: Any) -> None:
        """Resize the base's vocabulary to the adapter's, before the adapter is added.

        Raises:
            ValueError: the file cannot be read, or holds only one of embedding and head.
        """
        resize_for(base, read_tensors(self.folder / SAFETENSORS_WEIGHTS_NAME), self.folder)

    def load(self, model: Any) -> None:
        """Load its factors into the model; every rank must call.

        Raises:
            ValueError, RuntimeError: on every rank; the adapter has other layers than the model.
        """
        try:
            load_adapter(model, None, self.folder)
        except ValueError as error:
            config: Any = read_peft_config(self.folder)
            targets = config.target_modules
            # for all-linear PEFT writes every layer's path
            names = targets if isinstance(targets, str) else " ".join(sorted({name.split(".")[-1] for name in targets}))
            raise ValueError(f"{error}; the adapter was made with --target_modules {names}") from error


def continued_adapter(options: Options) -> ContinuedAdapter | None:
    """Return the adapter that ``--model`` names, or None if it names a base.

    Raises:
        ValueError: the adapter cannot be continued with these options; the message says what to give.
    """
    name = options.model.model
    if name is None or adapter_folder(name) is None:
        return None
    folder = find_model(name)
    merge = (
        f"merge it (export.py --adapter {name} --output_dir MERGED --merge) and give --model MERGED, which starts a "
        "fresh adapter"
    )
    base = base_of(name)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"model={name!r} is an adapter without an {SAFETENSORS_WEIGHTS_NAME}: export it from its sharded state "
            f"first (export.py --adapter {name} --output_dir ADAPTER) and give --model ADAPTER"
        )
    config: Any = read_peft_config(folder)
    _require_plain_lora(name, folder, config, options, merge)
    _require_same_settings(name, config, options, merge)
    return ContinuedAdapter(folder, base)


def _require_plain_lora(name: str, folder: Path, config: PeftConfig, options: Options, merge: str) -> None:
    lora = options.lora
    if lora.latent or type(config) is not LoraConfig:
        kind = f"--method {lora.method} makes its start from the base" if lora.latent else "it is no LoRA adapter"
        raise ValueError(f"model={name!r} is an adapter ({config.peft_type}), and {kind}: {merge}")
    if lora.init_lora_weights != "default":
        raise ValueError(
            f"model={name!r} is an adapter, whose factors --init_lora_weights {lora.init_lora_weights} would replace: "
            f"drop the option, or {merge}"
        )
    if saved_mark(folder) is not None:
        raise ValueError(
            f"model={name!r} is an adapter of a base that was changed at the start: make it an ordinary one first "
            f"(export.py --adapter {name} --output_dir ADAPTER) and give --model ADAPTER, or --model BASE with "
            "--resume_from_checkpoint to continue its run"
        )
    if changes_base(config.init_lora_weights):
        raise ValueError(
            f"model={name!r} was started by PEFT with init_lora_weights={config.init_lora_weights!r}, which changed "
            "its base: convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _require_same_settings(name: str, config: LoraConfig, options: Options, merge: str) -> None:
    """Refuse settings that would change the adapter's function."""
    given = LoraConfig(**{field: getattr(options.lora, option) for field, option in _OPTIONS.items()})
    for field in dataclasses.fields(LoraConfig):
        saved, asked = getattr(config, field.name), getattr(given, field.name)
        if field.name in _OTHERS or saved == asked:
            continue
        option = _OPTIONS.get(field.name)
        remedy = f"give --{option} {saved}" if option else "no option gives that"
        raise ValueError(
            f"model={name!r} is an adapter with {field.name}={saved!r}, and this run's would have {asked!r}: "
            f"{remedy}, or {merge}"
        )
