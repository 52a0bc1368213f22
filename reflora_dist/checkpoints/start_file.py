"""The initial factors of a run whose initialization (its *start*) changed the base: their file and their mark.

    initial_factors.safetensors   lora_A and lora_B of every adapter at the beginning of training, by PEFT's names;
                                  the header holds the scaling of each pair, checksums of the base weights before
                                  and after the change, and the mark

The *mark* is a text in ``init_lora_weights`` of an adapter that belongs to a changed base. It names the start and a
fingerprint of the factors. PEFT refuses to load an adapter with this unknown value: on the original base the model
would be another function.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.open_files import open_tensors, read_json, read_tensors, readable
from ..files.records import require_fields

FILE_NAME = "initial_factors.safetensors"
_CONFIG_NAME = "adapter_config.json"
_VERSION = 1
_PEFT_STARTS = ("pissa", "olora", "lora_ga", "corda", "loftq")
_MARK = "base changed at the start by "
_Value = TypeVar("_Value", int, float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The initialization of a run that changed the base.

    Attributes:
        init: the kind of start.
        scaling: s of every pair, by the pair's name.
        before, after: checksums of every pair's base weight before and after the change, by the pair's name.
        base_dtype: dtype of every pair's base weight, by the pair's name.
        factors: initial ``lora_A`` and ``lora_B`` by PEFT's names. A start that was just made, not read, has them on
            the first rank only.
        mark: the mark in the configuration of adapters that belong to this start.
    """

    init: str
    scaling: Mapping[str, float]
    before: Mapping[str, int]
    after: Mapping[str, int]
    base_dtype: Mapping[str, str]
    factors: Mapping[str, Tensor]
    mark: str


def make_mark(init: str, factors: Mapping[str, Tensor], before: Mapping[str, int]) -> str:
    """Return the mark of a start. No PEFT release takes it for a known start, and its error shows the first words.

    Args:
        init: the kind of start.
        factors: the initial factors by PEFT's names, on the CPU.
        before: checksums of the original base weights.
    """
    digest = hashlib.sha256(json.dumps(dict(before), sort_keys=True).encode())
    for name in sorted(factors):
        digest.update(name.encode() + factors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return f"{_MARK}{init} ({digest.hexdigest()[:16]}): make it an ordinary adapter with reflora_dist.convert_adapter"


def is_mark(init_lora_weights: Any) -> bool:
    """Return whether an adapter's ``init_lora_weights`` is a mark: its base was changed at the start."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(_MARK)


def changes_base(init_lora_weights: Any) -> bool:
    """Return whether PEFT itself changes the base for this ``init_lora_weights``."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(_PEFT_STARTS)


def init_of_mark(mark: str) -> str:
    """Return the kind of start that a mark names."""
    return mark.removeprefix(_MARK).partition(" ")[0]


def _peft_model(model: nn.Module) -> PeftModel | None:
    """Return the first PEFT model in a model, bare or wrapped, or None."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def mark_of(model: nn.Module) -> str | None:
    """Return the mark of a model whose base was changed at the start, else None. The same on every rank."""
    peft_model = _peft_model(model)
    configs: Any = peft_model.peft_config.values() if peft_model is not None else ()
    starts = [getattr(config, "init_lora_weights", None) for config in configs]
    return next((init for init in starts if is_mark(init)), None)


def saved_mark(adapter_dir: str | Path) -> str | None:
    """Return the mark of a saved adapter or checkpoint; None if its base is the original one or it has no adapter.

    Raises:
        ValueError: the adapter's configuration is damaged.
    """
    path = Path(adapter_dir) / _CONFIG_NAME
    if not path.is_file():
        return None
    value = read_json(path).get("init_lora_weights")
    return value if is_mark(value) else None


def require_same_start(model: nn.Module, saved: str | None, source: Any) -> None:
    """Refuse factors that were trained on another base: the model would be another function.

    Args:
        model: the model to load into.
        saved: the mark of the saved factors; None if their base was not changed.
        source: name of the saved factors in error messages.

    Raises:
        ValueError: ``saved`` is not the model's mark.
    """
    present = mark_of(model)
    if present == saved:
        return
    if saved is None:
        raise ValueError(f"{source} belongs to an unchanged base, and this model's is a {present!r} one: build it anew")
    remedy = "call reflora_dist.replay_initialization(model, checkpoint) before wrapping the model"
    raise ValueError(
        f"{source} was trained on a {saved!r} base and this model's is {present or 'the original'!r}: {remedy}"
    )


def write_start(model: nn.Module, folder: str | Path) -> None:
    """Write the initial factors into the folder of an adapter or checkpoint. Local: only the first rank writes.

    Warns if PEFT itself changed the base: then no file exists from which the change could be repeated.
    """
    peft_model = _peft_model(model)
    start = getattr(peft_model, "_reflora_start", None)
    if start is None:
        _warn_of_peft_starts(peft_model)
        return
    if not start.factors:
        return
    header = {field: json.dumps(dict(getattr(start, field))) for field in ("scaling", "before", "after", "base_dtype")}
    header |= {"version": str(_VERSION), "init": start.init, "mark": start.mark}
    target = Path(folder) / FILE_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{FILE_NAME}.part")
    save_file(dict(start.factors), part, metadata=header)
    os.replace(part, target)


def _warn_of_peft_starts(peft_model: Any) -> None:
    for config in peft_model.peft_config.values() if peft_model is not None else ():
        init = getattr(config, "init_lora_weights", None)
        if changes_base(init):
            warnings.warn(
                f"init_lora_weights={init!r} changed the base, which is not saved, and the change cannot always be "
                "repeated: use init_lora_weights=True and reflora_dist.initialize_adapters(model, init) instead",
                stacklevel=3,
            )


def find_start(folder: str | Path) -> Path:
    """Return the file of initial factors of a checkpoint or adapter, in its folder or in the folder above.

    Raises:
        FileNotFoundError: neither folder holds the file.
    """
    for candidate in (Path(folder) / FILE_NAME, Path(folder).resolve().parent / FILE_NAME):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} needs {FILE_NAME}, which is neither in it nor in the folder above: copy it from the output folder "
        "or from another checkpoint of the same run"
    )


def read_start(folder: str | Path) -> Start:
    """Read the start of a checkpoint or adapter.

    Raises:
        FileNotFoundError: there is no file of initial factors.
        ValueError: the file is damaged, of another version, or belongs to another run.
    """
    path = find_start(folder)
    with open_tensors(path) as file:
        header = file.metadata() or {}
    if header.get("version", str(_VERSION)) != str(_VERSION):
        raise ValueError(f"{path} has version {header['version']}, and this release reads {_VERSION}: install another")
    factors = read_tensors(path)
    with readable(path):
        fields = {field: json.loads(header[field]) for field in ("scaling", "before", "after", "base_dtype")}
        _require_fields(fields, path)
        start = Start(init=header["init"], mark=header["mark"], factors=factors, **fields)
        mark = make_mark(start.init, factors, start.before)
    if mark != start.mark:
        raise ValueError(f"{path} is damaged: its factors are not those that its header names")
    wanted = saved_mark(folder)
    if wanted is not None and wanted != start.mark:
        raise ValueError(f"{path} belongs to {start.mark!r}, not to {folder}, which is {wanted!r}")
    return start


def _require_fields(fields: Mapping[str, Any], path: Path) -> None:
    require_fields(fields, dict.fromkeys(fields, Mapping), path)
    for field, kind in (("scaling", int | float), ("before", int), ("after", int), ("base_dtype", str)):
        require_fields(fields[field], dict.fromkeys(fields[field], kind), f"{path}, {field}")
