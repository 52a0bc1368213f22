"""Checkpoints of a training loop without HF Trainer, under every engine.

A checkpoint is a folder that all ranks share::

    reflora.json               the record: engine, ranks, schedule; written last, so its presence means "complete"
    adapter_model.safetensors  the adapter as PEFT writes it, beside its adapter_config.json
    state/                     trainable weights and optimizer state as the engine saves them

These files do not contain the frozen base, except the embedding and the head if the vocabulary was resized.
"""

from __future__ import annotations

import contextlib
import io
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

from ..collectives.ranks import is_first_rank, raise_on_all_ranks, world_size
from ..engines.base import Engine
from ..engines.find_training import find_training_engine
from ..engines.pairs import clean_name, find_peft_model
from ..engines.tall import peft_key, transposed
from ..files.records import require_files
from ..files.replacement import Replacement, remove
from ..files.safe_pickles import SafeReader, require_safe, require_states
from ..step.handle import Handle
from ..step.handle_state import check_adapters, describe_storage
from .adapter_files import load_adapter, load_frozen, save_adapter
from .errors import named_load_errors, named_write_errors
from .record import (
    RECORD,
    STATE,
    UNIVERSAL,
    read_checkpoint_record,
    require_converted,
    require_in_order,
    require_loadable_on,
    require_same_engine,
    require_same_storage,
    write_record,
)
from .start_file import FILE_NAME as START_FILE
from .start_file import mark_of, require_same_start

__all__ = ["load_adapter", "load_checkpoint", "save_adapter", "save_checkpoint"]

_TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_checkpoint(output_dir: str | Path, model: nn.Module, optimizer: Any, handle: Handle | None = None) -> None:
    """Save the adapter, the optimizer's state and the schedule, to continue with :func:`load_checkpoint`.

    The caller saves learning-rate schedulers outside DeepSpeed, random states and the position in the data.

    Args:
        output_dir: the checkpoint's folder, on storage that all ranks share. An earlier checkpoint there stays until
            the new one, written beside it as ``.NAME.part``, is complete and replaces it. Other files in it are kept.
        model: the wrapped model that the engine returned; under FSDP2 and in one process the model itself.
        optimizer: the optimizer that was given to ``attach``.
        handle: the handle that ``attach`` returned; None if nothing is attached (LoRA-SB).

    Raises:
        TypeError, ValueError, OSError, RuntimeError: on every rank; the model is not what the engine returned, the
            folder holds files but no checkpoint, or it cannot be written. Under DeepSpeed only the rank whose write
            fails raises: end that process, since the others wait for it.

    Communication: the engine's own, that of :func:`save_adapter` and a few all-gathers of small objects; every rank
    must call.
    """
    replacement = _replacement(output_dir)
    with raise_on_all_ranks("preparing to save the checkpoint"):
        if is_first_rank():
            replacement.begin()
    save_into(replacement.part, model, optimizer, handle)
    with raise_on_all_ranks("replacing the checkpoint"):
        if is_first_rank():
            replacement.finish()


def _replacement(output_dir: str | Path) -> Replacement:
    own = (STATE, UNIVERSAL, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, START_FILE, "README.md")
    return Replacement(Path(output_dir), RECORD, own)


def save_into(folder: Path, model: nn.Module, optimizer: Any, handle: Handle | None = None) -> None:
    """Write a checkpoint into a folder directly; other files in the folder stay.

    Arguments, errors and communication are those of :func:`save_checkpoint`. An older record and state in
    the folder are removed first.
    """
    with raise_on_all_ranks("preparing to save the checkpoint"):
        engine = find_training_engine(model, optimizer)
        engine.require_wrapped(model)
        find_peft_model(model)  # refuses several PEFT models before anything is removed
        if is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD).unlink(missing_ok=True)  # no checkpoint until the record is written again
            for stale in (STATE, UNIVERSAL):
                remove(folder / stale)
    save_adapter(model, folder)
    # No raise_on_all_ranks() here: a rank that leaves the engine's collectives early cannot tell the others by another
    # collective.
    with named_write_errors(folder):
        if engine.state_format == "deepspeed":
            with _frozen_left_out(model.module):  # type: ignore[arg-type]
                model.save_checkpoint(str(folder), tag=STATE, exclude_frozen_parameters=True)  # type: ignore[operator]
        else:
            dcp.save(_training_state(model, engine), checkpoint_id=folder / STATE)
    with raise_on_all_ranks("completing the checkpoint"):
        if is_first_rank():
            write_record(folder, engine, handle, mark_of(model))


def load_checkpoint(
    output_dir: str | Path, model: nn.Module, optimizer: Any, *, trust_pickles: bool = False
) -> dict[str, Any]:
    """Load a checkpoint of :func:`save_checkpoint` into a model and an optimizer that are made as for a new run.

    Load first, then attach. Frozen adapter parameters are loaded from the adapter's files.

    The number of ranks may differ from the run that wrote the checkpoint: under FSDP2, DDP and in one process as it is,
    under DeepSpeed once the checkpoint is converted (the error names the command), under FSDP1 not.

    Args:
        output_dir: the checkpoint's folder.
        model, optimizer: as for :func:`save_checkpoint`, before any step.
        trust_pickles: whether to unpickle any class in DCP's and DeepSpeed's files, which can run code. By default
            only the classes that these formats need are unpickled.

    Returns:
        The handle's state, for ``attach(model, optimizer, config, state_dict=...)``; empty if there was no handle.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: on every rank and before anything is changed. There is no complete
            checkpoint, it belongs to another engine, other adapters or another number of ranks, or DeepSpeed would
            mix up its parameters. A RuntimeError may also come while the state is loaded, if it does not fit.

    Communication: the engine's own, that of :func:`load_adapter` for frozen parameters, and two all-gathers of small
    objects; every rank must call.
    """
    with raise_on_all_ranks("opening the checkpoint"):
        folder = _replacement(output_dir).complete_copy()
        engine = find_training_engine(model, optimizer)
        engine.require_wrapped(model)
        universal = engine.state_format == "deepspeed" and bool(model.load_universal_checkpoint())  # type: ignore[operator]
        record = read_checkpoint_record(folder)
        require_same_engine(record, engine, folder)
        check_adapters(record["handle"], engine.pairs, str(folder))
        require_same_storage(record, engine, folder)
        require_same_start(model, record.get("start"), folder)
        if universal:
            require_converted(folder)
            require_in_order(model, record, folder, trust_pickles)
            require_states(_own_share(sorted((folder / UNIVERSAL).rglob("*.pt"))), trust_pickles)
        else:
            require_files(folder, record["files"])
            require_loadable_on(world_size(), record, engine, folder, trust_pickles)
        if engine.state_format != "deepspeed":
            SafeReader(folder / STATE, trust_pickles).read_metadata()  # refuses classes that DCP would call
        elif not universal:  # DeepSpeed's loading calls any class that its files name
            require_states(_own_share(sorted((folder / STATE).glob("*.pt"))), trust_pickles)
    with raise_on_all_ranks("loading the checkpoint"), named_load_errors(folder):
        if engine.state_format == "deepspeed":
            tag = UNIVERSAL if universal else STATE
            model.load_checkpoint(str(folder), tag=tag, load_module_strict=False)  # type: ignore[operator]
            if universal:
                _restore_groups(engine, record)
        else:
            state = _training_state(model, engine)
            dcp.load(state, storage_reader=SafeReader(folder / STATE, trust_pickles), planner=_Planner(trust_pickles))
            _set_training_state(model, engine, state)
    load_frozen(model, folder)
    handle = record["handle"]
    return {**handle, "stored_tall": describe_storage(engine.pairs)} if handle else handle


def _own_share(paths: list[Path]) -> list[Path]:
    """Return this rank's share of the paths. The shares of all ranks cover all paths."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return paths[rank :: world_size()]


def complete_state(folder: str | Path) -> Path | None:
    """Return the folder of the training state in a checkpoint of :func:`save_checkpoint`, or None if there is none.

    Local, no communication.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is incomplete or damaged; the message names the file.
    """
    checkpoint = Path(folder)
    if not (checkpoint / STATE).is_dir():
        return None
    files = read_checkpoint_record(checkpoint)["files"]
    require_files(checkpoint, {name: size for name, size in files.items() if name.startswith(f"{STATE}/")})
    return checkpoint / STATE


# --- the training state ---


class _Planner(DefaultLoadPlanner):
    """torch's load planner without its guess that a checkpoint with keys that a rank lacks is older than torch 2.4.

    Under FSDP1 a rank lacks the keys of parameters that it holds no part of, and a checkpoint that is taken for an old
    one would not load. Values that are no tensors (learning rates, counts) are unpickled with torch's safe classes
    only, unless ``trust_pickles`` is set.
    """

    def __init__(self, trust_pickles: bool) -> None:
        super().__init__()
        self._trust_pickles = trust_pickles

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        if not self._trust_pickles:
            require_safe(value)
        super().load_bytes(read_item, value)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata, not self.allow_partial_load)


def _training_state(model: nn.Module, engine: Engine) -> dict[str, Any]:
    """Return the state dictionaries of trained parameters that DCP saves and loads into. Shards are not gathered."""
    with _without_empty_groups(engine.optimizer):
        if engine.state_dict_lacks_parameters:
            # torch loses parameters in an FSDP1 NO_SHARD model's own state_dict(). They are whole on every rank.
            weights = {clean_name(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
            return {"model": weights, "optimizer": get_optimizer_state_dict(model, engine.optimizer)}
        weights, state = get_state_dict(model, engine.optimizer, options=_TRAINABLE_ONLY)  # type: ignore[assignment]
    frozen = _frozen_names(model)
    weights = {name: weight for name, weight in weights.items() if clean_name(name) not in frozen}
    if engine.has_peft_form:
        optimizer_state: dict[str, Any] = state  # type: ignore[assignment]
        state = _renamed_state(optimizer_state, {name: peft_key(name) for name in optimizer_state["state"]})
    return {"model": weights, "optimizer": state}


def _renamed_state(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the optimizer's state dictionary with parameters renamed, and transposed if their name changes."""
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
    """Return all names of frozen parameters: torch and DeepSpeed skip only the first name, tied weights have two."""
    return {clean_name(name) for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


@contextlib.contextmanager
def _frozen_left_out(module: nn.Module) -> Iterator[None]:
    """Keep frozen parameters out of the module's state dictionary, under each of their names."""
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
        if engine.state_dict_lacks_parameters:
            # dcp.load has written the weights in place.
            set_optimizer_state_dict(model, engine.optimizer, state["optimizer"])
            return
        if engine.has_peft_form:
            own = {peft_key(name): name for name in map(clean_name, dict(model.named_parameters()))}
            saved: dict[str, Any] = state["optimizer"]
            state["optimizer"] = _renamed_state(saved, {name: own.get(name, name) for name in saved["state"]})
            # torch adds wrappers' prefixes to parameters' own names only, and skips other names without an error.
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
    """Hide empty parameter groups: torch's state dictionaries cannot hold them, and PEFT's LoRA+ makes two."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        others = iter(optimizer.param_groups)
        optimizer.param_groups = [next(others) if group["params"] else group for group in groups]


def _restore_groups(engine: Engine, record: Mapping[str, Any]) -> None:
    """Repair the optimizer after DeepSpeed has loaded a universal checkpoint into ZeRO-3.

    DeepSpeed leaves one step count that all of a rank's sub-groups share and would each advance, and the first group's
    learning rate in every group.
    """
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    for group, settings in zip(engine.optimizer.param_groups, record["param_groups"], strict=True):
        group.update(settings)
