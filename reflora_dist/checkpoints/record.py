"""The record of a checkpoint, and the checks that the checkpoint fits the run that continues."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..collectives.ranks import world_size
from ..engines.base import Engine
from ..files.records import file_sizes, read_record, require_fields, write_json
from ..step.handle import Handle
from ..step.handle_state import check_storage, describe_storage
from ..step.rite_optimizer import LoRARite
from .deepspeed_universal import conversion, is_round_robin, refuse_round_robin, was_round_robin

_FORMAT_VERSION = 1
RECORD = "reflora.json"
_FIELDS = {"version": int, "engine": str, "world_size": int, "handle": Mapping, "files": Mapping, "param_groups": list}
STATE = "state"
UNIVERSAL = "state_universal"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")


def write_record(folder: Path, engine: Engine, handle: Handle | None, start: str | None) -> None:
    """Write the record of a checkpoint whose other files are complete. ``start`` is the mark of a changed base."""
    written = {
        name: size
        for name, size in file_sizes(folder).items()
        if name.startswith(f"{STATE}/") or name.endswith(SAFETENSORS_WEIGHTS_NAME)
    }
    record = {
        "version": _FORMAT_VERSION,
        "engine": engine.name,
        "world_size": world_size(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "handle": {} if handle is None else handle.state_dict(),
        "start": start,
        "stored_tall": describe_storage(engine.pairs),
        "param_groups": _group_settings(engine),
        "files": written,
    }
    write_json(folder / RECORD, record)


def read_checkpoint_record(folder: Path) -> dict[str, Any]:
    """Return the record of a checkpoint.

    Raises:
        FileNotFoundError: there is no record, so the checkpoint is not complete.
        ValueError: the record is damaged or of another version.
    """
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no complete checkpoint: {RECORD}, which is written last, is missing; load an earlier one"
        )
    record = read_record(path, _FIELDS)
    if record["version"] != _FORMAT_VERSION:
        raise ValueError(f"{path} has version={record['version']!r}, this release reads {_FORMAT_VERSION}")
    if record["handle"]:  # empty where nothing was attached
        require_fields(record["handle"], {"steps": int}, f"{path}, handle")
    return record


def require_same_engine(record: Mapping[str, Any], engine: Engine, folder: Path) -> None:
    """Refuse a checkpoint of an engine with another format.

    Raises:
        ValueError: the engine that wrote the checkpoint has another ``state_name``.
    """
    written = "ddp" if record["engine"] == "single" else record["engine"]
    if written != engine.state_name:
        raise ValueError(
            f"{folder} was written under {record['engine']} and this is {engine.name}: continue under "
            f"{record['engine']}, or start a new run from the adapter (PeftModel.from_pretrained)"
        )


def require_same_storage(record: Mapping[str, Any], engine: Engine, folder: Path) -> None:
    """Make sure that lora_A is stored as in the checkpoint, if the state in it is not in PEFT's form.

    Raises:
        ValueError: the storage differs.
    """
    if not engine.has_peft_form or isinstance(engine.optimizer, LoRARite):  # LoRARite packs its moments
        written = {"adapters": (), "stored_tall": record.get("stored_tall", describe_storage([]))}
        check_storage(written, engine.pairs, str(folder))


def require_loadable_on(
    present: int, record: Mapping[str, Any], engine: Engine, folder: Path, trust_pickles: bool
) -> None:
    """Make sure that ``present`` ranks can load a checkpoint that another number of ranks may have written.

    Raises:
        ValueError: they cannot; the message names a way, for DeepSpeed the command that converts the checkpoint.
    """
    if record["world_size"] == present or engine.resumes_on_other_ranks:
        return
    problem = f"{folder} was written by {record['world_size']} ranks and this run has {present}"
    if engine.state_format == "deepspeed" and not was_round_robin(folder / STATE, trust_pickles):
        raise ValueError(
            f"{problem}; DeepSpeed needs a universal checkpoint for that: run "
            f"`{conversion(folder / STATE, folder / UNIVERSAL)}` and set "
            '{"checkpoint": {"load_universal": true}} in the DeepSpeed configuration'
        )
    if engine.state_format == "deepspeed":
        raise ValueError(
            f"{problem}, and ds_to_universal mixes up the parameters of runs with round_robin_gradients: use "
            f"{record['world_size']} ranks"
        )
    raise ValueError(f"{problem}, which {engine.name} cannot load: use {record['world_size']} ranks (or FSDP2)")


def require_converted(folder: Path) -> None:
    """Make sure that a checkpoint has been converted to DeepSpeed's universal format.

    Raises:
        FileNotFoundError: it has not; the message names the command.
    """
    if not (folder / UNIVERSAL / "zero").is_dir():
        raise FileNotFoundError(
            f"load_universal is set but {folder / UNIVERSAL} holds no universal checkpoint: run "
            f"`{conversion(folder / STATE, folder / UNIVERSAL)}`, or take load_universal out of the DeepSpeed "
            "configuration"
        )


def require_in_order(model: Any, record: Mapping[str, Any], folder: Path, trust_pickles: bool) -> None:
    """Refuse a universal checkpoint whose parameters round_robin_gradients mixes up, as it was written or is loaded.

    Raises:
        ValueError: the run that wrote it, or this run, uses round_robin_gradients.
    """
    universal = folder / UNIVERSAL
    remedy = f"use {record['world_size']} ranks and take load_universal out of the DeepSpeed configuration"
    refuse_round_robin(universal, f"resume from {folder / STATE}, which was converted: {remedy}", trust_pickles)
    if is_round_robin(model.zero_optimization_stage(), model.zero_round_robin_gradients()):
        raise ValueError(
            f"with round_robin_gradients DeepSpeed mixes up the parameters of {universal} as it loads them: take "
            "round_robin_gradients out of the DeepSpeed configuration"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _group_settings(engine: Engine) -> list[dict[str, float]]:
    return [
        {key: value for key, value in group.items() if isinstance(value, (int, float))}
        for group in engine.optimizer.param_groups
    ]
