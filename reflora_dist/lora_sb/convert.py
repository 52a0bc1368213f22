"""Conversion of LoRA-XS and LoRA-SB adapters to ordinary LoRA adapters, for tools that know only these."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor

from ..files.open_files import read_peft_config, read_tensors
from ..starts.convert import exact_pattern
from .config import LoraXSConfig


def convert_lora_xs(adapter_dir: str | Path, output_dir: str | Path) -> None:
    """Convert a saved LoRA-XS or LoRA-SB adapter to a LoRA adapter: ``lora_A = A``, ``lora_B = B R``.

    r, scale and modules stay the same. It runs in one process and reads only the files. ``lora_B`` is computed in
    float64 and rounded once. The weights of ``modules_to_save`` are copied.

    Args:
        adapter_dir: folder of a LoRA-XS or LoRA-SB adapter.
        output_dir: another folder, which receives the same two files of the LoRA adapter.

    Raises:
        ValueError: the folders are the same, or a module's name cannot be matched.
        OSError: a file cannot be read or written.
    """
    source, target = Path(adapter_dir), Path(output_dir)
    config = read_peft_config(source)
    assert isinstance(config, LoraXSConfig)
    if source.resolve() == target.resolve():
        raise ValueError(f"output_dir={str(target)!r} is the adapter's own folder, whose files would be lost")
    tensors = read_tensors(source / SAFETENSORS_WEIGHTS_NAME)
    lora_config = _lora_config(config, tensors)
    target.mkdir(parents=True, exist_ok=True)
    save_file(_as_lora(tensors), target / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora_config.save_pretrained(str(target))


def _as_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    for key, tensor in tensors.items():
        if ".lora_xs_B." in key:
            latent = tensors.get(key.replace(".lora_xs_B.", ".lora_xs_R."))
            if latent is None or latent.shape != (tensor.shape[-1], tensor.shape[-1]):
                raise ValueError(f"the adapter lacks the r x r matrix that belongs to {key}, or it has another shape")
            product = (tensor.double() @ latent.double()).to(torch.promote_types(tensor.dtype, latent.dtype))
            converted[key.replace(".lora_xs_B.", ".lora_B.")] = product
        elif ".lora_xs_R." not in key:
            converted[key.replace(".lora_xs_A.", ".lora_A.")] = tensor
    return converted


def _lora_config(config: LoraXSConfig, tensors: dict[str, Tensor]) -> LoraConfig:
    # alpha needs a value per module: lora_alpha=None means s = 1 for every r, and a module's r and alpha may come from
    # different patterns
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        name, is_a, _ = key.partition(".lora_xs_A.")
        if is_a:
            path = name.removeprefix("base_model.model.")
            ranks[path] = tensor.shape[0]
            alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), path), config.lora_alpha)
            alphas[path] = ranks[path] if alpha is None else alpha
    default_alpha = config.r if config.lora_alpha is None else config.lora_alpha
    return LoraConfig(
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=config.r,
        lora_alpha=default_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=_listed(config.target_modules),
        exclude_modules=_listed(config.exclude_modules),
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        rank_pattern=exact_pattern(ranks, config.r),
        alpha_pattern=exact_pattern(alphas, default_alpha),
        modules_to_save=config.modules_to_save,
    )


def _listed(names: list[str] | set[str] | str | None) -> list[str] | str | None:
    return sorted(names) if isinstance(names, (list, set)) else names
