"""Conversion of an adapter that was trained on a changed base into one for the unchanged base."""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from ..checkpoints.start_file import _CONFIG_NAME, Start, _Value, read_start, saved_mark
from ..files.open_files import read_json, read_tensors


def convert_changed_base(adapter_dir: str | Path, output_dir: str | Path) -> None:
    """Convert an adapter that was trained on a changed base into an ordinary adapter of the original base.

    One process, no ranks. With the initial factors ``A0``, ``B0`` the trained function is ``W - s B0 A0 + s B A``.
    This equals ``W`` with the adapter ``[B, -B0] [A; A0]``, whose r is doubled. Plain PEFT loads the result; alpha is
    set so that the scaling stays the same.

    Args:
        adapter_dir: folder of an adapter or checkpoint; the initial factors are in it or in its parent.
        output_dir: folder that receives ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, the adapter and the initial factors do not belong
            together, or the adapter already belongs to an unchanged base.
    """
    source, target = Path(adapter_dir), Path(output_dir)
    if saved_mark(source) is None:
        raise ValueError(f"{source} holds no adapter of a changed base: there is nothing to convert")
    start = read_start(source)
    tensors = read_tensors(source / SAFETENSORS_WEIGHTS_NAME)
    missing = sorted(start.factors.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{source / SAFETENSORS_WEIGHTS_NAME} lacks {missing[0]}")
    for name, initial in start.factors.items():
        if tensors[name].shape != initial.shape or not bool(tensors[name].isfinite().all()):
            raise ValueError(
                f"{source / SAFETENSORS_WEIGHTS_NAME} holds {name} as {tuple(tensors[name].shape)} for a start of "
                f"{tuple(initial.shape)}, or with values that are not finite: it is broken, take another checkpoint"
            )
        initial = initial.to(tensors[name].dtype)
        side_a = _is_lora_a(name)
        tensors[name] = torch.cat([tensors[name], initial if side_a else -initial], dim=0 if side_a else 1).contiguous()
    config = read_json(source / _CONFIG_NAME)
    config |= _ordinary_config(start)
    target.mkdir(parents=True, exist_ok=True)
    part = target / f".{SAFETENSORS_WEIGHTS_NAME}.part"
    save_file(tensors, part, metadata={"format": "pt"})
    # the replaced adapter may belong to a changed base: remove its configuration before its weights change
    (target / _CONFIG_NAME).unlink(missing_ok=True)
    os.replace(part, target / SAFETENSORS_WEIGHTS_NAME)
    (target / f".{_CONFIG_NAME}.part").write_text(json.dumps(config, indent=2, sort_keys=True))
    os.replace(target / f".{_CONFIG_NAME}.part", target / _CONFIG_NAME)


def _ordinary_config(start: Start) -> dict[str, Any]:
    """Return the changed fields of ``LoraConfig``: every pair's r is doubled, and alpha keeps its scaling."""
    ranks, alphas = {}, {}
    for name, factor in start.factors.items():
        if _is_lora_a(name):
            layer = name.partition(".lora_")[0]
            path = layer.removeprefix("base_model.model.")
            ranks[path] = 2 * factor.shape[0]
            alpha = start.scaling[layer] * ranks[path]
            alphas[path] = int(alpha) if alpha == int(alpha) else alpha
    settings = [(ranks[path], alphas[path]) for path in ranks]
    (rank, alpha), _ = collections.Counter(settings).most_common(1)[0]
    return {
        "init_lora_weights": True,
        "lora_ga_config": None,
        "use_rslora": False,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": exact_pattern(ranks, rank),
        "alpha_pattern": exact_pattern(alphas, alpha),
    }


def exact_pattern(values: Mapping[str, _Value], default: _Value) -> dict[str, _Value]:
    """Return a ``rank_pattern`` or ``alpha_pattern`` in which each key matches exactly one module.

    Modules with the default value get no key.

    Args:
        values: r or alpha of every adapted module, by its path in the base model.
        default: the configuration's ``r`` or ``lora_alpha``.

    Raises:
        ValueError: PEFT would read a different value for some module.
    """
    # PEFT matches (.*\.)?(key)$, so the key "l" would match "enc.l" too; "^" excludes such prefixes
    pattern = {f"^{re.escape(path)}": value for path, value in values.items() if value != default}
    for path, value in values.items():
        # PEFT takes the first key that matches, and the file has the keys sorted
        if pattern.get(get_pattern_key(sorted(pattern), path), default) != value:
            raise ValueError(f"PEFT's patterns of names cannot give the module {path!r} its {value}: rename it")
    return pattern


def _is_lora_a(name: str) -> bool:
    return ".lora_A." in name or name.endswith(".lora_embedding_A")
