"""The initial factors of a run whose start changed the base: their file, their mark, and their conversion.

    initial_factors.safetensors   lora_A and lora_B of every adapter as training began, by the names that PEFT's own
                                  file uses; in its header the scaling of each pair, checksums of the base weights
                                  before and after the change, and the mark

The *mark* is the ``init_lora_weights`` of an adapter that belongs to a changed base. It names the start and a
fingerprint of the factors. PEFT does not know it and refuses to load such an adapter, which on the original base
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
    """How a run began.

    Attributes:
        init: the kind of start.
        scaling: of every pair, by its name.
        before, after: checksums of every pair's base weight, original and changed.
        base_dtype: of every pair's base weight.
        factors: ``lora_A`` and ``lora_B`` by PEFT's names; of a start that was just made on the first rank only.
        mark: what stands in the configuration of adapters that belong to this start.
    """

    init: str
    scaling: Mapping[str, float]
    before: Mapping[str, int]
    after: Mapping[str, int]
    base_dtype: Mapping[str, str]
    factors: Mapping[str, Tensor]
    mark: str


def make_mark(init: str, factors: Mapping[str, Tensor], before: Mapping[str, int]) -> str:
    """A text that no PEFT release takes for a start that it knows; its first words are what a user then reads."""
    digest = hashlib.sha256(json.dumps(dict(before), sort_keys=True).encode())
    for name in sorted(factors):
        digest.update(name.encode() + factors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return f"{_MARK}{init} ({digest.hexdigest()[:16]}): make it an ordinary adapter with reflora_dist.convert_adapter"


def is_mark(init_lora_weights: Any) -> bool:
    """Whether an adapter's ``init_lora_weights`` says that its base was changed."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(_MARK)


def changes_base(init_lora_weights: Any) -> bool:
    """Whether PEFT changes the base by itself for this ``init_lora_weights``."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(_PEFT_STARTS)


def init_of_mark(mark: str) -> str:
    """The kind of start in a mark."""
    return mark.removeprefix(_MARK).partition(" ")[0]


def _peft_model(model: nn.Module) -> PeftModel | None:
    """The PEFT model in a model, wrapped or not."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def mark_of(model: nn.Module) -> str | None:
    """The mark of a model whose base was changed, on every rank; None for any other."""
    peft_model = _peft_model(model)
    configs: Any = peft_model.peft_config.values() if peft_model is not None else ()
    starts = [getattr(config, "init_lora_weights", None) for config in configs]
    return next((init for init in starts if is_mark(init)), None)


def saved_mark(adapter_dir: str | Path) -> str | None:
    """The mark of a saved adapter or checkpoint; None if its base is the original one, or it holds no adapter.

    Raises:
        ValueError: its configuration is damaged.
    """
    path = Path(adapter_dir) / _CONFIG_NAME
    if not path.is_file():
        return None
    value = read_json(path).get("init_lora_weights")
    return value if is_mark(value) else None


def require_same_start(model: nn.Module, saved: str | None, source: Any) -> None:
    """Refuse factors for a base that is not the model's: the function would be another one.

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
    """Put the initial factors beside an adapter or checkpoint. Local: the first rank writes, any other returns.

    Warns of a base that PEFT changed by itself, since then there is nothing to repeat the change from.
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
                f"init_lora_weights={init!r} changed the base, which is not saved, and not in a way that can always be "
                "repeated: use init_lora_weights=True and reflora_dist.initialize_adapters(model, init) instead",
                stacklevel=3,
            )


def find_start(folder: str | Path) -> Path:
    """The initial factors that belong to a checkpoint or adapter: in it, or beside it in the run's output folder.

    Raises:
        FileNotFoundError: they are in neither.
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
        FileNotFoundError, ValueError: there is none, it is damaged, or it belongs to another run.
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
