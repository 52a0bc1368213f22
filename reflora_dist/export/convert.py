"""Conversion of a saved adapter into an ordinary LoRA adapter of the original base."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.start_file import saved_mark
from ..files.open_files import read_peft_config
from ..lora_sb.config import LoraXSConfig
from ..lora_sb.convert import convert_lora_xs
from ..starts.convert import convert_changed_base


def is_convertible(adapter_dir: str | Path) -> bool:
    """Return whether a folder holds an adapter that :func:`convert_adapter` takes.

    Raises:
        OSError, ValueError: its configuration is missing or damaged.
    """
    return saved_mark(Path(adapter_dir)) is not None or isinstance(read_peft_config(Path(adapter_dir)), LoraXSConfig)


def convert_adapter(adapter_dir: str | Path, output_dir: str | Path) -> None:
    """Convert an adapter into an ordinary LoRA adapter of the original base, which every tool loads.

    One process, no ranks; only the files are read.

    - LoRA-XS and LoRA-SB: ``lora_A = A``, ``lora_B = B R``, with the same r.
    - An adapter of a changed base (``initialize_adapters``): ``[B, -B0] [A; A0]``, with twice the r.

    Args:
        adapter_dir: folder with ``adapter_config.json`` and ``adapter_model.safetensors``; for a changed base the
            initial factors are in it or in its parent.
        output_dir: another folder, which receives the same two files of the converted adapter.

    Raises:
        OSError, ValueError: the adapter is of another kind, or a file is missing or damaged.
    """
    source = Path(adapter_dir)
    if saved_mark(source) is not None:
        convert_changed_base(source, output_dir)
    elif isinstance(config := read_peft_config(source), LoraXSConfig):
        convert_lora_xs(source, output_dir)
    else:
        raise ValueError(
            f"{source} holds an ordinary {config.peft_type} adapter, on an unchanged base: there is nothing to convert"
        )
