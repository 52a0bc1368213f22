"""Save and load the adapter, and the state of a training loop of one's own, under every engine.

A checkpoint is a folder that all ranks share::

    reflora.json               who wrote it, and the schedule; written last, so that its presence means "complete"
    adapter_model.safetensors  the adapter and its configuration as PEFT writes them
    state/                     trainable weights and optimizer state, as the engine itself saves them

The frozen base is in none of these files.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from .adapter_files import (
    agreed,
    find_peft_model,
    is_first_rank,
    load_adapter,
    load_frozen,
    save_adapter,
    world_size,
)
from .adapters import clean_name
from .checkpoint_errors import named_load_errors, named_write_errors
from .engines import Engine
from .files import file_sizes, require_fields, require_files, write_json
from .handle_state import check_adapters, check_storage, describe_storage
from .integrate import Handle
from .lora_rite import LoRARite
from .replacement import Replacement, remove
from .safe_pickles import SafeReader, require_states
from .start_files import FILE_NAME as START_FILE
from .start_files import mark_of, require_same_start
from .tall import peft_key, transposed
from .trained import find_training_engine
from .universal import conversion, is_round_robin, refuse_round_robin, was_round_robin

__all__ = ["load_adapter", "load_checkpoint", "save_adapter", "save_checkpoint"]

_FORMAT_VERSION = 1
_RECORD = "reflora.json"
_FIELDS = {"version": int, "engine": str, "world_size": int, "handle": Mapping, "files": Mapping, "param_groups": list}
_STATE = "state"
_UNIVERSAL = "state_universal"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
_TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(output_dir: str | Path, model: nn.Module, optimizer: Any, handle: Handle | None = None) -> None:
    """Save the adapter, the optimizer's state and the schedule, to continue with :func:`load_checkpoint`.

    Learning-rate schedulers outside DeepSpeed, random states and the position in the data are the caller's.

    Args:
        output_dir: on storage that all ranks share; an earlier checkpoint there is replaced, and stays as it is until
            the new one is complete (written beside it, as ``.NAME.part``). What others have put into it is kept.
        model: as the engine returned it (wrapped); under FSDP2 and in one process the model itself.
        optimizer: as given to ``attach``.
        handle: what ``attach`` returned; None where nothing is attached (LoRA-SB).

    Raises:
        TypeError, ValueError, OSError, RuntimeError: on every rank; the model is not what the engine returned, the
            folder holds files and no checkpoint, or cannot be written. Under DeepSpeed a write that fails is raised
            where it failed: end that process, since the others wait for it.

    Communication: the engine's own, and that of :func:`save_adapter`; every rank must call.
    """
    replacement = _replacement(output_dir)
    with agreed("preparing to save the checkpoint"):
        if is_first_rank():
            replacement.begin()
    save_into(replacement.part, model, optimizer, handle)
    with agreed("replacing the checkpoint"):
        if is_first_rank():
            replacement.finish()


def _replacement(output_dir: str | Path) -> Replacement:
    own = (_STATE, _UNIVERSAL, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, START_FILE, "README.md")
    return Replacement(Path(output_dir), _RECORD, own)


def save_into(folder: Path, model: nn.Module, optimizer: Any, handle: Handle | None = None) -> None:
    """:func:`save_checkpoint` into a folder that is no checkpoint yet, whose other files stay.

    Args, errors and communication as there.
    """
    with agreed("preparing to save the checkpoint"):
        engine = find_training_engine(model, optimizer)
        _require_wrapped(model, engine)
        find_peft_model(model)  # refuses several, before anything is removed
        if is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _RECORD).unlink(missing_ok=True)  # from here on until the end it is no checkpoint
            for stale in (_STATE, _UNIVERSAL):
                remove(folder / stale)
    save_adapter(model, folder)
    # not agreed upon: a rank that leaves an engine's collectives early cannot tell the others by another collective
    with named_write_errors(folder):
        if _is_deepspeed(engine):
            with _frozen_left_out(model.module):  # type: ignore[arg-type]
                model.save_checkpoint(str(folder), tag=_STATE, exclude_frozen_parameters=True)  # type: ignore[operator]
        else:
            dcp.save(_training_state(model, engine), checkpoint_id=folder / _STATE)
    with agreed("completing the checkpoint"):
        if is_first_rank():
            _write_record(folder, engine, handle, mark_of(model))


def load_checkpoint(
    output_dir: str | Path, model: nn.Module, optimizer: Any, *, trust_pickles: bool = False
) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote into a model and optimizer that were made as for a new run.

    The handle's state comes back, for ``attach(model, optimizer, config, state_dict=...)``: load first, then attach.
    It is empty if there was no handle. Adapter parameters that are frozen come from the adapter's files.

    Another number of ranks than that which wrote the checkpoint works under FSDP2, DDP and one process, and under
    DeepSpeed once the checkpoint is converted (the error names the command); it does not under FSDP1.

    Args:
        output_dir: of a checkpoint.
        model, optimizer: as for :func:`save_checkpoint`, before any step.
        trust_pickles: unpickle whatever DCP's and DeepSpeed's files hold, which can run code; by default only the
            classes that these formats need.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: on every rank and before anything is changed; there is no
            complete checkpoint, it belongs to another engine, other adapters or another number of ranks, or DeepSpeed
            would mix up its parameters. RuntimeError, too, where the state in it does not fit.

    Communication: the engine's own and two all-gathers of small objects; every rank must call.
    """
    with agreed("opening the checkpoint"):
        folder = _replacement(output_dir).complete_copy()
        engine = find_training_engine(model, optimizer)
        _require_wrapped(model, engine)
        universal = _is_deepspeed(engine) and bool(model.load_universal_checkpoint())  # type: ignore[operator]
        record = _read_record(folder)
        _require_same_engine(record, engine, folder)
        check_adapters(record["handle"], engine.pairs, str(folder))
        _require_same_storage(record, engine, folder)
        require_same_start(model, record.get("start"), folder)
        if universal:
            _require_converted(folder)
            _require_in_order(model, record, folder, trust_pickles)
            require_states(_own_share(sorted((folder / _UNIVERSAL).rglob("*.pt"))), trust_pickles)
        else:
            require_files(folder, record["files"])
            _require_loadable_on(world_size(), record, engine, folder, trust_pickles)
        if not _is_deepspeed(engine):
            SafeReader(folder / _STATE, trust_pickles).read_metadata()  # refuses what DCP would call
        elif not universal:  # DeepSpeed calls whatever its files name
            require_states(_own_share(sorted((folder / _STATE).glob("*.pt"))), trust_pickles)
    with agreed("loading the checkpoint"), named_load_errors(folder):
        if _is_deepspeed(engine):
            tag = _UNIVERSAL if universal else _STATE
            model.load_checkpoint(str(folder), tag=tag, load_module_strict=False)  # type: ignore[operator]
            if universal:
                _restore_groups(engine, record)
        else:
            state = _training_state(model, engine)
            dcp.load(state, storage_reader=SafeReader(folder / _STATE, trust_pickles), planner=_Planner(trust_pickles))
            _set_training_state(model, engine, state)
    load_frozen(model, folder)
    handle = record["handle"]
    return {**handle, "stored_tall": describe_storage(engine.pairs)} if handle else handle


def _own_share(paths: list[Path]) -> list[Path]:
    """What this rank looks at, so that together they look at all."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return paths[rank :: world_size()]


def complete_state(folder: str | Path) -> Path | None:
    """The training state in a checkpoint of :func:`save_checkpoint`; None if the folder is none. No ranks.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete or damaged; the message names the file.
    """
    checkpoint = Path(folder)
    if not (checkpoint / _STATE).is_dir():
        return None
    files = _read_record(checkpoint)["files"]
    require_files(checkpoint, {name: size for name, size in files.items() if name.startswith(f"{_STATE}/")})
    return checkpoint / _STATE


# --- the training state ---


class _Planner(DefaultLoadPlanner):
    """torch's, but for its guess that a checkpoint is older than torch 2.4 where a rank lacks some of its keys.

    Under FSDP1 a rank lacks what it holds no part of; taken for old, the checkpoint would not load. What is no tensor
    (learning rates, counts) is unpickled with torch's safe classes only.
    """

    def __init__(self, trust_pickles: bool) -> None:
        super().__init__()
        self._trust_pickles = trust_pickles

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        if not self._trust_pickles:
            torch.load(value, weights_only=True)
            value.seek(0)
        super().load_bytes(read_item, value)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata, not self.allow_partial_load)


def _training_state(model: nn.Module, engine: Engine) -> dict[str, Any]:
    """The state dictionaries of what is trained, as DCP saves it and as it loads into. Sharded, nothing is gathered."""
    with _without_empty_groups(engine.optimizer):
        if _is_no_shard(engine):
            # torch loses parameters in an FSDP1 NO_SHARD model's own state_dict(); they are whole on every rank
            weights = {clean_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
            return {"model": weights, "optimizer": get_optimizer_state_dict(model, engine.optimizer)}
        weights, state = get_state_dict(model, engine.optimizer, options=_TRAINABLE_ONLY)  # type: ignore[assignment]
    frozen = _frozen_names(model)
    weights = {name: weight for name, weight in weights.items() if clean_name(name) not in frozen}
    if _in_peft_form(engine):
        optimizer_state: dict[str, Any] = state  # type: ignore[assignment]
        state = _renamed_state(optimizer_state, {name: peft_key(name) for name in optimizer_state["state"]})
    return {"model": weights, "optimizer": state}


def _in_peft_form(engine: Engine) -> bool:
    """Whether a checkpoint has lora_A as ``[r, in]``, its moments too, however the model stores it.

    FSDP1 and DeepSpeed save by parameters' names and shapes.
    """
    return engine.name in ("single", "ddp", "fsdp2")


def _renamed_state(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The optimizer's state dictionary with parameters under other names, and transposed where the name changes."""
    entries = {
        names[name]: entry
        if names[name] == name
        else {key: transposed(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for name, entry in state["state"].items()
    }
    groups = [
        {**group, "params": [names.get(name, name) for name in group["params"]]} for group in state["param_groups"]
    ]
    return {"state": entries, "param_groups": groups}


def _frozen_names(model: nn.Module) -> set[str]:
    """All of them: torch and DeepSpeed leave out what is frozen under its first name only; a tied embedding has two."""
    return {clean_name(name) for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


@contextlib.contextmanager
def _frozen_left_out(module: nn.Module) -> Iterator[None]:
    """Keep them out of the module's state dictionary."""
    frozen = _frozen_names(module)

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if clean_name(name) in frozen]:
            del state[name]

    hook = module.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        hook.remove()


def _set_training_state(model: nn.Module, engine: Engine, state: dict[str, Any]) -> None:
    with _without_empty_groups(engine.optimizer):
        if _is_no_shard(engine):
            # the weights were loaded in place
            set_optimizer_state_dict(model, engine.optimizer, state["optimizer"])
            return
        if _in_peft_form(engine):
            own = {peft_key(name): name for name in map(clean_name, dict(model.named_parameters()))}
            saved: dict[str, Any] = state["optimizer"]
            state["optimizer"] = _renamed_state(saved, {name: own.get(name, name) for name in saved["state"]})
            # torch finds wrappers' prefixes for parameters' own names only, and leaves others out without a word
            weights: dict[str, Tensor] = state["model"]
            state["model"] = {
                own.get(name, name): transposed(weight) if own.get(name, name) != name else weight
                for name, weight in weights.items()
            }
        set_state_dict(
            model,
            engine.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_TRAINABLE_ONLY,
        )


@contextlib.contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """torch's state dictionaries have no place for groups without parameters, of which PEFT's LoRA+ makes two."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        others = iter(optimizer.param_groups)
        optimizer.param_groups = [next(others) if group["params"] else group for group in groups]


def _restore_groups(engine: Engine, record: Mapping[str, Any]) -> None:
    """Mend what loading a universal checkpoint into ZeRO-3 leaves: one step count shared by all of a rank's
    sub-groups, each of which would advance it, and the first group's learning rate in every group."""
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    for group, settings in zip(engine.optimizer.param_groups, record["param_groups"], strict=True):
        group.update(settings)


def _group_settings(engine: Engine) -> list[dict[str, float]]:
    return [
        {key: value for key, value in group.items() if isinstance(value, (int, float))}
        for group in engine.optimizer.param_groups
    ]


def _is_no_shard(engine: Engine) -> bool:
    return engine.name == "fsdp1" and engine.layout == "whole"


# --- the checkpoint's record ---


def _write_record(folder: Path, engine: Engine, handle: Handle | None, start: str | None) -> None:
    written = {
        name: size
        for name, size in file_sizes(folder).items()
        if name.startswith(f"{_STATE}/") or name.endswith(SAFETENSORS_WEIGHTS_NAME)
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
    write_json(folder / _RECORD, record)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no complete checkpoint: {_RECORD}, which is written last, is missing; load an earlier one"
        )
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); load an earlier checkpoint") from error
    require_fields(record, _FIELDS, path)
    if record["version"] != _FORMAT_VERSION:
        raise ValueError(f"{path} has version={record['version']!r}, this release reads {_FORMAT_VERSION}")
    require_fields(record["files"], dict.fromkeys(record["files"], int), f"{path}, files")
    if record["handle"]:  # empty where nothing was attached
        require_fields(record["handle"], {"steps": int}, f"{path}, handle")
    return record


def _require_same_engine(record: Mapping[str, Any], engine: Engine, folder: Path) -> None:
    # every rank of DDP holds what one process holds
    written, present = ("ddp" if name == "single" else name for name in (record["engine"], engine.name))
    if written != present:
        raise ValueError(
            f"{folder} was written under {record['engine']} and this is {engine.name}: continue under "
            f"{record['engine']}, or start a new run from the adapter (PeftModel.from_pretrained)"
        )


def _require_same_storage(record: Mapping[str, Any], engine: Engine, folder: Path) -> None:
    """Where the state is not brought into PEFT's form, lora_A has to be stored as it was."""
    if not _in_peft_form(engine) or isinstance(engine.optimizer, LoRARite):  # whose moments are packed
        written = {"adapters": (), "stored_tall": record.get("stored_tall", describe_storage([]))}
        check_storage(written, engine.pairs, str(folder))


def _require_loadable_on(
    present: int, record: Mapping[str, Any], engine: Engine, folder: Path, trust_pickles: bool
) -> None:
    if record["world_size"] == present or engine.name in ("single", "ddp", "fsdp2"):
        return
    problem = f"{folder} was written by {record['world_size']} ranks and this run has {present}"
    if _is_deepspeed(engine) and not was_round_robin(folder / _STATE, trust_pickles):
        raise ValueError(
            f"{problem}; DeepSpeed needs a universal checkpoint for that: run "
            f"`{conversion(folder / _STATE, folder / _UNIVERSAL)}` and set "
            '{"checkpoint": {"load_universal": true}} in the DeepSpeed configuration'
        )
    if _is_deepspeed(engine):
        raise ValueError(
            f"{problem}, and ds_to_universal mixes up the parameters of runs with round_robin_gradients: use "
            f"{record['world_size']} ranks"
        )
    raise ValueError(f"{problem}, which {engine.name} cannot load: use {record['world_size']} ranks (or FSDP2)")


def _require_converted(folder: Path) -> None:
    if not (folder / _UNIVERSAL / "zero").is_dir():
        raise FileNotFoundError(
            f"load_universal is set but {folder / _UNIVERSAL} holds no universal checkpoint: run "
            f"`{conversion(folder / _STATE, folder / _UNIVERSAL)}`, or take load_universal out of the DeepSpeed "
            "configuration"
        )


def _require_in_order(model: Any, record: Mapping[str, Any], folder: Path, trust_pickles: bool) -> None:
    universal = folder / _UNIVERSAL
    remedy = f"use {record['world_size']} ranks and take load_universal out of the DeepSpeed configuration"
    refuse_round_robin(universal, f"resume from {folder / _STATE}, which was converted: {remedy}", trust_pickles)
    if is_round_robin(model.zero_optimization_stage(), model.zero_round_robin_gradients()):
        raise ValueError(
            f"with round_robin_gradients DeepSpeed mixes up the parameters of {universal} as it loads them: take "
            "round_robin_gradients out of the DeepSpeed configuration"
        )


def _require_wrapped(model: nn.Module, engine: Engine) -> None:
    if _is_deepspeed(engine) and not hasattr(model, "load_universal_checkpoint"):
        raise ValueError(f"pass the engine that deepspeed.initialize returned, not the bare {type(model).__name__}")
    if engine.name == "fsdp1" and not isinstance(model, FullyShardedDataParallel):
        raise ValueError(f"pass the FullyShardedDataParallel model, not the bare {type(model).__name__}")


def _is_deepspeed(engine: Engine) -> bool:
    return engine.name.startswith("zero")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
