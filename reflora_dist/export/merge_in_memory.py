"""Merge of an adapter of parameters (PEFT's ``target_parameters``) into its base, with the whole model in memory.

transformers joins the experts of a file's weights as it loads them, and takes them apart as it saves, so these models
cannot be merged file by file.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.merged_record import merged_header
from ..files.base_files import load_base, read_model_config, require_no_missing
from ..files.open_files import read_tensors, readable
from ..files.other_files import other_files, require_fitting_tokenizer
from ..files.output_folder import new_folder, require_space
from .empty_model import model_class, with_adapter


def merge_in_memory(
    source: Path,
    config: PeftConfig,
    tensors: dict[str, Tensor],
    base: Path,
    target: Path,
    *,
    dtype: torch.dtype | None,
    tokenizer: Path,
) -> None:
    """Merge as PEFT's ``merge_and_unload()`` does, and save as transformers does.

    Args:
        source: the adapter's folder.
        config: the adapter's configuration.
        tensors: the adapter's tensors by PEFT's names.
        base: the base's folder.
        target: the output folder.
        dtype: dtype to which the base is rounded before the merge; None keeps the stored one.
        tokenizer: folder whose tokenizer replaces the base's.

    Raises:
        ValueError: the base or the adapter is damaged, they do not fit each other, the tokenizer has ids beyond the
            embedding's rows, or the disk is too small.
    """
    settings = read_model_config(str(base))
    if getattr(settings, "quantization_config", None) is not None:
        raise ValueError(f"{base} is quantized, so a merge would not be exact: give the base that it was made from")
    model, missing = load_base(model_class(source, config, settings), str(base), dtype=dtype or "auto")
    require_no_missing(str(base), missing)
    copied = other_files(base, tokenizer)
    require_fitting_tokenizer(copied.values(), base, model.get_input_embeddings().weight.shape[0])
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    require_space(target, weights + sum(path.stat().st_size for path in copied.values()))
    adapted = with_adapter(model, config, tensors, source, by_weight=False)
    with readable(source, "it is damaged, or belongs to another base"):
        merged = adapted.merge_and_unload(safe_merge=True)
    with new_folder(target) as part:
        for file, path in copied.items():
            shutil.copyfile(path, part / file)
        merged.save_pretrained(part)
        for path in part.glob("*.safetensors"):
            marked = path.with_name(f".{path.name}.part")  # the tensors may still be read from the first file
            save_file(read_tensors(path), marked, {"format": "pt", **merged_header(base, source)})
            os.replace(marked, path)
