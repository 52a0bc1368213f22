"""Saving and loading of adapter files in PEFT's format, under any engine."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ..collectives.ranks import is_first_rank, raise_on_all_ranks, world_size
from ..engines.find_training import find_training_engine
from ..engines.pairs import clean_name, find_peft_model
from ..engines.tall import TALL_NAME, TallLinear, peft_key, transposed
from ..engines.whole_parameters import Owner, gather, owned_tensors, scatter, whole_shapes
from ..files.open_files import open_tensors, read_tensors
from .embeddings import embedding_names, is_spare, kept_embeddings, vocabulary_is_resized
from .start_file import require_same_start, saved_mark, write_start


class _Entry(NamedTuple):
    """The place of one adapter parameter in PEFT's state dictionary and files."""

    lookup_key: str  # in the state dictionary that PEFT is given
    file: str  # relative to the adapter's folder
    file_key: str
    is_tall: bool  # the model stores it transposed


def save_adapter(model: nn.Module, output_dir: str | Path) -> None:
    """Write the adapters as PEFT does, as ``adapter_model.safetensors`` and ``adapter_config.json``. Rank 0 writes.

    The files hold all that PEFT saves with an adapter (modules_to_save, DoRA magnitudes), and the embedding and the
    head if LoRA adapts them or the vocabulary was resized. An adapter that is not named "default" has a sub-folder.
    ``PeftModel.from_pretrained`` loads the files, onto a base with the same vocabulary.

    Args:
        model: the PEFT model, bare or wrapped; under FSDP1 the model that FSDP returned.
        output_dir: the folder, created if it does not exist. Each file in it is replaced atomically.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: on every rank; the model is no PEFT model or a part of an FSDP1
            model, or the folder cannot be written.

    Communication: one gather per saved parameter (FSDP1: per unit that holds any), none for the rest of the frozen
    base; four all-gathers of small objects. Every rank must call.
    """
    folder = Path(output_dir)
    with raise_on_all_ranks("preparing to save the adapter"):
        peft_model = find_peft_model(model)
        owners = owned_tensors(model, peft_model)
        if is_first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass  # a folder that cannot be written raises before any gather
    entries = _entries(peft_model, owners)
    resized = has_resized_vocabulary(model)
    embeddings = {
        _file(adapter): kept_embeddings(peft_model, owners, adapter, resized) for adapter in peft_model.peft_config
    }
    frozen = {name for keys in embeddings.values() for name in keys.values()}
    gathered: dict[str, Tensor] = {}
    for name, tensor in gather(model, owners, entries.keys() | frozen):
        # One parameter at a time is whole on all ranks; only the writing rank keeps it.
        gathered[name] = torch.empty(0)
        if is_first_rank():
            value = tensor.detach().to("cpu", copy=True)
            gathered[name] = transposed(value) if name in entries and entries[name].is_tall else value
    with raise_on_all_ranks("saving the adapter"), tempfile.TemporaryDirectory() as elsewhere:
        target = tempfile.mkdtemp(prefix=".adapter-", dir=folder) if is_first_rank() else elsewhere
        try:
            peft_model.save_pretrained(
                target,
                state_dict={entry.lookup_key: gathered[name] for name, entry in entries.items()},
                is_main_process=is_first_rank(),
                save_embedding_layers=False,
            )
            if is_first_rank():
                for file, keys in embeddings.items():
                    _complete(Path(target) / file, {key: gathered[name] for key, name in keys.items()})
                _move_into_place(Path(target), folder)
                write_start(model, folder)
        finally:
            shutil.rmtree(target, ignore_errors=True)


def has_resized_vocabulary(model: nn.Module) -> bool:
    """Return whether the model's vocabulary has another size than its base's. The first rank looks for the base.

    Communication: two all-gathers of small objects; every rank must call.
    """
    with raise_on_all_ranks("looking for the base's vocabulary"):
        peft_models = [module for module in model.modules() if isinstance(module, PeftModel)]
        found = [is_first_rank() and any(map(vocabulary_is_resized, peft_models))] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, found[0])
    return found[0]


def load_adapter(model: nn.Module, optimizer: Any, adapter_dir: str | Path) -> None:
    """Load adapters that :func:`save_adapter` or PEFT wrote into a model, and into the masters that its engine trains.

    DeepSpeed trains its own fp32 masters and would overwrite values that are in the model alone. The optimizer's
    moments stay as they are. Warns if the model's vocabulary was resized and the files hold no embedding.

    Args:
        model: the PEFT model with the same adapters, bare or wrapped; under FSDP1 the model that FSDP returned.
        optimizer: the optimizer that is given to ``attach``; None if there is none yet.
        adapter_dir: the folder with ``adapter_model.safetensors``, on storage that all ranks can read.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: on every rank; a file is missing or cannot be read, belongs to
            another base, lacks a parameter of the adapters or holds it in another shape.

    Communication: as :func:`save_adapter`; every rank must call.
    """
    with raise_on_all_ranks("opening the adapter"):
        peft_model = find_peft_model(model)
        require_same_start(model, saved_mark(adapter_dir), adapter_dir)
        owners = owned_tensors(model, peft_model)
    values = _read(model, adapter_dir, owners, _entries(peft_model, owners))
    values |= _read_embeddings(model, adapter_dir, owners, has_resized_vocabulary(model))
    with raise_on_all_ranks("loading the adapter"):
        write_weights(model, optimizer, owners, values)


def load_frozen(model: nn.Module, adapter_dir: str | Path) -> None:
    """Load the frozen parameters of the adapters' files, which engines leave out of their training state.

    These are frozen adapter parameters and, if the vocabulary was resized, the embedding and the head.

    Args:
        model, adapter_dir: as for :func:`load_adapter`.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: as :func:`load_adapter`.

    Communication: as :func:`load_adapter`, for these parameters alone; every rank must call.
    """
    with raise_on_all_ranks("opening the adapter"):
        peft_model = find_peft_model(model)
        owners = owned_tensors(model, peft_model)
    entries = _entries(peft_model, owners)
    frozen = {name: entry for name, entry in entries.items() if not getattr(*owners[name]).requires_grad}
    values = _read(model, adapter_dir, owners, frozen, others=entries)
    if has_resized_vocabulary(model):
        values |= _read_embeddings(model, adapter_dir, owners, resized=True)
    with raise_on_all_ranks("loading the adapter"):
        scatter(model, owners, values)


def write_weights(model: nn.Module, optimizer: Any, owners: Mapping[str, Owner], values: Mapping[str, Tensor]) -> None:
    """Write whole values, the same on all ranks, into the model and into the masters that its engine trains.

    Args:
        model: the PEFT model, bare or wrapped.
        optimizer: the optimizer that is given to ``attach``; None if there is none yet.
        owners: module and attribute of every parameter, by name, as ``owned_tensors`` returns them.
        values: whole values by name, in the form in which the model stores them.

    Communication: as :func:`scatter`; every rank must call.
    """
    scatter(model, owners, values)
    if optimizer is not None:
        engine = find_training_engine(model, optimizer)
        engine.write_masters({getattr(*owners[name]): value for name, value in values.items()})


def _read(
    model: nn.Module,
    adapter_dir: str | Path,
    owners: Mapping[str, Owner],
    entries: Mapping[str, _Entry],
    others: Mapping[str, _Entry] | None = None,
) -> dict[str, Tensor]:
    """Read the values of ``entries`` in the form in which the model stores them. Nothing is changed.

    The files may also hold ``others``, by default only ``entries``, the embeddings and spare copies.
    """
    with raise_on_all_ranks("reading the adapter"):
        embeddings = embedding_names(find_peft_model(model), owners)
        files = {file: read_tensors(Path(adapter_dir) / file) for file in {entry.file for entry in entries.values()}}
        for file, tensors in files.items():
            known = {entry.file_key for entry in (others or entries).values() if entry.file == file}
            known |= {key for key in tensors if key in embeddings or is_spare(key, known)}
            wanted = {entry.file_key for entry in entries.values() if entry.file == file}
            require_tensors(Path(adapter_dir) / file, tensors, wanted, known)
        values = {name: files[entry.file][entry.file_key] for name, entry in entries.items()}
        values = {name: transposed(value) if entries[name].is_tall else value for name, value in values.items()}
        for name, shape in whole_shapes(model, {name: owners[name] for name in values}).items():
            if values[name].shape != shape:
                raise ValueError(
                    f"{adapter_dir} holds {entries[name].file_key} in the shape {tuple(values[name].shape)}, the "
                    f"model's is {tuple(shape)}: give LoraConfig the r of that adapter"
                )
        return values


def _read_embeddings(
    model: nn.Module, adapter_dir: str | Path, owners: Mapping[str, Owner], resized: bool
) -> dict[str, Tensor]:
    """Read the base's embedding and head, if the files hold them. Nothing is changed."""
    with raise_on_all_ranks("reading the embedding"):
        peft_model = find_peft_model(model)
        values: dict[str, Tensor] = {}
        for adapter in peft_model.peft_config:
            path = Path(adapter_dir) / _file(adapter)
            names = embedding_names(peft_model, owners)
            with open_tensors(path) as file:
                tensors = {key: file.get_tensor(key) for key in names.keys() & set(file.keys())}
            names = {key: name for key, name in names.items() if key in tensors}
            require_tensors(path, tensors, names, tensors)
            values |= {name: tensors[key] for key, name in names.items()}
            found = {id(getattr(*owners[name])) for name in names.values()}
            for key, name in kept_embeddings(peft_model, owners, adapter, resized).items() if resized else ():
                if id(getattr(*owners[name])) not in found and is_first_rank():
                    warnings.warn(
                        f"{path} holds no {key}, and the model's vocabulary is not its base's: the model keeps the "
                        "rows that it has, which may be others than were trained with",
                        stacklevel=3,
                    )
        for name, shape in whole_shapes(model, {name: owners[name] for name in values}).items():
            if values[name].shape != shape:
                raise ValueError(
                    f"{adapter_dir} holds {name} in the shape {tuple(values[name].shape)}, the model's is "
                    f"{tuple(shape)}: call resize_token_embeddings({values[name].shape[0]}) on the base before "
                    "get_peft_model"
                )
        return values


def require_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Collection[str], known: Collection[str]) -> None:
    """Make sure that an adapter's file holds all tensors that a model needs, and none that it has no place for.

    Args:
        path: the adapter's file, for error messages.
        tensors: the tensors of the file by key.
        wanted: keys that the model needs.
        known: keys that the file may hold.

    Raises:
        ValueError: a tensor is missing, has no place or is not finite; the message names it.
    """
    missing, extra = sorted(set(wanted) - tensors.keys()), sorted(tensors.keys() - set(known))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the model's parameters ({missing[0]}, ...)")
    if extra:
        raise ValueError(
            f"{path} holds {len(extra)} tensors that the model has no place for ({extra[0]}, ...): give LoraConfig the "
            "target_modules of that adapter"
        )
    broken = [key for key in sorted(wanted) if not bool(torch.isfinite(tensors[key]).all())]
    if broken:
        raise ValueError(f"{path} holds {broken[0]} with values that are not finite: it is broken, take another one")


def _entries(peft_model: PeftModel, owners: Mapping[str, Owner]) -> dict[str, _Entry]:
    """Return the entries of all adapter parameters by name. PEFT chooses them among empty stand-ins for the tensors."""
    keys = _lookup_keys(peft_model, owners)
    stand_ins = {name: torch.empty(0) for name in owners}
    names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    entries: dict[str, _Entry] = {}
    for adapter in peft_model.peft_config:
        kept = get_peft_model_state_dict(
            peft_model,
            {keys[name]: stand_in for name, stand_in in stand_ins.items()},
            adapter_name=adapter,
            save_embedding_layers=False,
        )
        if not kept:
            raise RuntimeError(f"PEFT finds nothing that belongs to adapter {adapter!r}")
        for key, stand_in in kept.items():
            name = names[id(stand_in)]
            module, attribute = owners[name]
            is_tall = isinstance(module, TallLinear) and attribute == TALL_NAME
            entries[name] = _Entry(keys[name], _file(adapter), clean_name(key), is_tall)
    return entries


def _lookup_keys(peft_model: PeftModel, names: Iterable[str]) -> dict[str, str]:
    """Return, by name, the keys by which PEFT looks up the tensors.

    Under FSDP1 PEFT's paths contain the wrappers. Given names without them, PEFT would take the factors for base
    weights and write an empty adapter.
    """
    paths = {
        clean_name(path): path
        for path, module in peft_model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and clean_name(path) != path
    }
    keys = {}
    for name in names:
        layer = name
        while layer and layer not in paths:
            layer = layer.rpartition(".")[0]
        keys[name] = peft_key(paths[layer] + name.removeprefix(layer) if layer else name)
    return keys


def _file(adapter: str) -> str:
    """Return the file of an adapter's tensors, relative to the folder, as PEFT names it."""
    return SAFETENSORS_WEIGHTS_NAME if adapter == "default" else f"{adapter}/{SAFETENSORS_WEIGHTS_NAME}"


def _complete(path: Path, embeddings: Mapping[str, Tensor]) -> None:
    """Remove the wrappers' names from a file's keys, and add the embeddings, which PEFT was not given."""
    tensors = read_tensors(path)
    completed = {**{clean_name(key): tensor for key, tensor in tensors.items()}, **embeddings}
    if completed.keys() != tensors.keys():
        save_file(completed, path, metadata={"format": "pt"})


def _move_into_place(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(exist_ok=True)
        elif path.name != "README.md" or not destination.exists():  # a model card may have been edited
            os.replace(path, destination)
