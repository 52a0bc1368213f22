"""Consolidation of a sharded checkpoint's adapter, in one process without ranks, a GPU or the base.

The formats, each read by its own library:

    DCP         .metadata and *.distcp: FSDP2, FSDP1 and DDP, as HF Trainer, accelerate or save_checkpoint write them
    ZeRO        *_optim_states.pt of DeepSpeed's stages 1 to 3: the fp32 masters
    universal   zero/<parameter>/fp32.pt, written by ds_to_universal: the fp32 masters

DeepSpeed's files and DCP's .metadata are pickles. Unpickling allows only the classes that these formats need
(``safe_pickles``).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..checkpoints.deepspeed_universal import conversion, model_states, refuse_round_robin
from ..checkpoints.embeddings import is_spare, local_model_folder
from ..checkpoints.errors import named_read_errors
from ..checkpoints.start_file import FILE_NAME as START_FILE
from ..checkpoints.start_file import find_start, is_mark
from ..checkpoints.training_state import complete_state
from ..engines.pairs import clean_name
from ..engines.tall import in_peft_form
from ..files.open_files import open_tensors, read_json
from ..files.output_folder import new_folder, require_empty
from ..files.records import plain_name, require_zip
from ..files.safe_pickles import SafeReader, load_states, require_states
from ..files.stored_weights import StoredWeights
from ..lora_sb.config import LoraXSType
from ..starts.convert import convert_changed_base

CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_OF_MODEL = re.compile(rf"(?!optim)(\w+\.)*{re.escape(_PREFIX)}")  # excludes optimizer.state.(...)
_RANK = re.compile(r"(.*zero_pp_rank_)(\d+)(_mp_rank_\d+_optim_states\.pt)")
# Takes the shapes of a state by name; returns, for each wanted tensor, its name in PEFT's file.
_Choose = Callable[[Mapping[str, Sequence[int]]], dict[str, str]]


def consolidate_adapter(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    adapter_config: str | Path | None = None,
    adapter: str = "default",
    trust_pickles: bool = False,
) -> None:
    """Write the adapter of a sharded checkpoint in PEFT's format. One process, no ranks.

    The tensors equal those of the sharded state bit by bit. Under DeepSpeed these are the fp32 masters, even if the
    working copies are 16-bit. An adapter of a changed base becomes an ordinary one
    (:func:`reflora_dist.convert_adapter`).

    Args:
        checkpoint: a checkpoint of HF Trainer, accelerate or ``save_checkpoint``, or its folder of shards.
        output_dir: receives ``adapter_model.safetensors`` and ``adapter_config.json``; must not exist, or be empty.
        adapter_config: the adapter's configuration or its folder; by default the one in the checkpoint or its parent.
        adapter: the adapter's name in the model.
        trust_pickles: unpickle any object in DCP's and DeepSpeed's files, which can run code.

    Raises:
        FileNotFoundError, ValueError: the checkpoint has no sharded state, a file is missing or truncated (the message
            names it), or the state does not hold the whole adapter.
    """
    source, target = Path(checkpoint), Path(output_dir)
    require_empty(target)
    state = find_state(source)
    if state is None:
        raise FileNotFoundError(f"{source} holds no sharded state (.metadata, *_optim_states.pt or zero/*/fp32.pt)")
    config_path = find_config(source if adapter_config is None else Path(adapter_config), state)
    config = read_json(config_path)
    _require_known(config, config_path)
    tensors = _read_state(state, lambda shapes: _chosen(shapes, config, adapter, state), trust_pickles)
    _complete(tensors, config, config_path.parent, state)
    with new_folder(target) as part:
        if not is_mark(config.get("init_lora_weights")):
            _write(part, tensors, config)
            return
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), tensors, config)
            shutil.copyfile(find_start(config_path.parent), Path(folder) / START_FILE)
            convert_changed_base(folder, part)


def find_state(checkpoint: Path) -> Path | None:
    """Return the folder of shards in a checkpoint, or None.

    Raises:
        FileNotFoundError, ValueError: ``save_checkpoint`` wrote the checkpoint, and it is incomplete or damaged.
    """
    if _kind(checkpoint) is not None:
        return checkpoint
    state = complete_state(checkpoint)
    if state is not None:
        return state
    latest = checkpoint / "latest"
    if latest.is_file():
        return checkpoint / plain_name(latest.read_text().strip(), latest)
    return next((path.parent for path in sorted(checkpoint.glob("pytorch_model_fsdp_*/.metadata"))), None)


def _kind(folder: Path) -> str | None:
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        return "dcp"
    if (folder / "zero").is_dir():
        return "universal"
    return "zero" if any(folder.glob("*_optim_states.pt")) else None


# --- the state ---


def _read_state(folder: Path, choose: _Choose, trust_pickles: bool) -> dict[str, Tensor]:
    """Return the adapter's tensors by PEFT's names."""
    readers = {"dcp": _read_dcp, "zero": _read_zero, "universal": _read_universal}
    kind = _kind(folder)
    if kind is None:
        raise FileNotFoundError(f"{folder} is missing or holds no shards: the checkpoint is incomplete")
    tensors = readers[kind](folder, choose, trust_pickles)
    # engines that save by parameter name (ZeRO, FSDP1) save a tall lora_A as it is, which PEFT's format does not know
    return {key: tensor.detach().clone().contiguous() for key, tensor in in_peft_form(tensors).items()}


def _read_dcp(folder: Path, choose: _Choose, trust_pickles: bool) -> dict[str, Tensor]:
    reader = SafeReader(folder, trust_pickles)
    try:
        metadata = reader.read_metadata()
    except OSError as error:
        raise ValueError(f"{folder / '.metadata'} cannot be read ({error}): the checkpoint is incomplete") from error
    for place in (metadata.storage_data or {}).values():
        _require_size(folder / place.relative_path, place.offset + place.length)
    specs = {
        key: spec
        for key, spec in metadata.state_dict_metadata.items()
        if isinstance(spec, TensorStorageMetadata) and _OF_MODEL.match(key)
    }
    chosen = choose({key: spec.size for key, spec in specs.items()})
    if any(key.startswith("optimizer.") for key in metadata.state_dict_metadata):
        # save_checkpoint wrote it, so that it holds trained parameters only
        _warn_of_others(specs.keys() - chosen.keys(), folder)
    read: dict[str, Any] = {key: torch.empty(specs[key].size, dtype=specs[key].properties.dtype) for key in chosen}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # no_dist means to load without it
        with named_read_errors(folder):
            dcp.load(read, storage_reader=reader, no_dist=True)
    return {chosen[key]: tensor for key, tensor in read.items()}


def _read_zero(folder: Path, choose: _Choose, trust_pickles: bool) -> dict[str, Tensor]:
    shapes, frozen = _shapes(folder, trust_pickles)
    paths = sorted(folder.glob("*_states.pt"))
    for path in paths:
        require_zip(path)
    require_states(paths, trust_pickles)  # DeepSpeed itself would call any function that they name
    _require_all_ranks(folder, trust_pickles)
    state = _fp32_state(folder, with_frozen=False)
    chosen = choose({**frozen, **{name: tensor.shape for name, tensor in state.items()}})
    if chosen.keys() - state.keys():
        state = _fp32_state(folder, with_frozen=True)
    _warn_of_others(shapes.keys() - chosen.keys(), folder)
    return {key: state[name] for name, key in chosen.items()}


def _fp32_state(folder: Path, with_frozen: bool) -> dict[str, Tensor]:
    deepspeed = _zero_to_fp32()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints progress
        return deepspeed.get_fp32_state_dict_from_zero_checkpoint(
            str(folder.parent), tag=folder.name, exclude_frozen_parameters=not with_frozen
        )


def _read_universal(folder: Path, choose: _Choose, trust_pickles: bool) -> dict[str, Tensor]:
    shapes, _ = _shapes(folder, trust_pickles)
    refuse_round_robin(folder, "export from the checkpoint that was converted", trust_pickles)
    chosen = choose(shapes)
    _warn_of_others(shapes.keys() - chosen.keys(), folder)
    tensors = {}
    for name, key in chosen.items():
        path = folder / "zero" / name / "fp32.pt"
        require_zip(path)
        value = load_states(path, trust_pickles)
        # stage 3 saves a flat tensor, the other stages a dictionary
        tensors[key] = (value["param"] if isinstance(value, dict) else value).reshape(shapes[name])
    return tensors


def _shapes(folder: Path, trust_pickles: bool) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Return the shapes of the parameters that DeepSpeed trained, and of the frozen ones that it saved."""
    path = model_states(folder)
    require_zip(path)
    require_states([path], trust_pickles)
    states = _zero_to_fp32().parse_model_states([str(path)])[0]
    trained = {name: shape for group in states.param_shapes for name, shape in group.items()}
    return trained, states.frozen_param_shapes or {}


def _warn_of_others(names: Iterable[str], folder: Path) -> None:
    others = sorted(names)
    if others:
        warnings.warn(
            f"{folder} also holds {len(others)} trained parameters that PEFT's format has no place for and that are "
            f"left out ({others[0]}, ...): give them to modules_to_save",
            stacklevel=2,
        )


def _zero_to_fp32() -> Any:
    try:
        from deepspeed.utils import zero_to_fp32
    except ImportError as error:
        raise ValueError(f"reading a DeepSpeed checkpoint needs DeepSpeed ({error}): pip install deepspeed") from error
    return zero_to_fp32


# --- damaged files ---


def _require_size(path: Path, least: int) -> None:
    present = path.stat().st_size if path.is_file() else None
    if present is None or present < least:
        state = (
            "is missing" if present is None else f"has {present} bytes, less than the {least} that its metadata lists"
        )
        raise ValueError(f"{path} {state}: the checkpoint is damaged; take an earlier one")


def _require_all_ranks(folder: Path, trust_pickles: bool) -> None:
    files = {
        int(match[2]): match for match in map(_RANK.fullmatch, map(str, folder.glob("*_optim_states.pt"))) if match
    }
    if not files:
        raise ValueError(f"{folder} holds no zero_pp_rank_*_optim_states.pt: it is no ZeRO checkpoint")
    first = files[min(files)]
    state = load_states(Path(first[0]), trust_pickles)["optimizer_state_dict"]
    if "zero_stage" not in state:
        raise ValueError(
            f"{folder} was written by DeepSpeed's BF16_Optimizer, which only its converter reads: run "
            f"{conversion(folder, Path('UNIVERSAL'))} and export from UNIVERSAL"
        )
    count = state["partition_count"]
    for rank in range(max(count) if isinstance(count, list) else count):
        require_zip(Path(f"{first[1]}{rank}{first[3]}"))


# --- names ---


def _chosen(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], adapter: str, state: Path
) -> dict[str, str]:
    """Return PEFT's name for each tensor of a state that belongs to the adapter.

    Raises:
        ValueError: no tensor belongs to the adapter, or the state holds several models.
    """
    plain = {name: _plain_name(name) for name in shapes if _OF_MODEL.match(clean_name(name))}
    if len(set(plain.values())) < len(plain):
        raise ValueError(
            f"{state} holds several PEFT models ({', '.join(_prefixes(plain))}); an adapter belongs to one"
        )
    if any(re.search(r"\.lora_(A|embedding_A|xs_R)(\.weight|\.tall)?$", path) for path in plain.values()):
        return plain  # accelerate saved the tensors that PEFT had selected and named
    chosen = {name: key for name, path in plain.items() if (key := _peft_key(path, config, adapter)) is not None}
    if not chosen:
        others = sorted({match[1] for path in plain.values() if (match := re.search(r"\.lora_\w+\.(\w+)", path))})
        raise ValueError(f"{state} holds nothing of the adapter {adapter!r}; it has {', '.join(others) or 'none'}")
    return chosen | _resized({name: path for name, path in plain.items() if name not in chosen}, shapes, config)


def _resized(
    plain: Mapping[str, str], shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
) -> dict[str, str]:
    """Return the base's parameters whose size differs in the state: embedding and head after tokens were added."""
    try:
        base = StoredWeights(Path(local_model_folder(config["base_model_name_or_path"] or "", config.get("revision"))))
    except (KeyError, OSError, ValueError):  # the base is not on this machine
        return {}
    resized = {}
    for name, path in plain.items():
        key = path.removeprefix(_PREFIX).replace(".token_adapter", "").replace(".base_layer", "")
        stored, present = base.specs.get(key, ((), None))[0], tuple(shapes[name])
        # compare widths too: those of 4-bit weights differ, and they are not resized
        if stored and stored[1:] == present[1:] and stored[0] != present[0]:
            resized[name] = path
    return resized


def _prefixes(plain: Mapping[str, str]) -> list[str]:
    return sorted({clean_name(name).removesuffix(path).rstrip(".") for name, path in plain.items()})


def _plain_name(name: str) -> str:
    name = clean_name(name)
    return name[name.index(_PREFIX) :]


def _peft_key(path: str, config: Mapping[str, Any], adapter: str) -> str | None:
    """Return a parameter's name in PEFT's file; None if it belongs to the base or another adapter."""
    own = re.escape(adapter)
    saved = re.fullmatch(rf"(.+)\.modules_to_save\.{own}\.(.+)", path)
    if saved:
        return f"{saved[1]}.{saved[2]}"
    magnitude = re.fullmatch(rf"(.+\.lora_magnitude_vector)\.{own}(\.weight)?", path)
    if magnitude:
        return magnitude[1]
    tokens = re.fullmatch(rf"(.+\.token_adapter\.trainable_tokens_delta)\.{own}", path)
    if tokens:
        return tokens[1]
    factor = re.fullmatch(rf"(.+\.lora_\w+)\.{own}(\.\w+)?", path)
    if factor:
        return f"{factor[1]}{factor[2] or ''}"
    bias = config.get("bias", "none")
    wanted = (bias == "all" and path.endswith(".bias")) or (bias == "lora_only" and path.endswith(".base_layer.bias"))
    inside = re.search(r"\.(lora_\w+|modules_to_save|original_module)\.", path)
    return path if wanted and not inside else None


# --- the adapter ---


def find_config(place: Path, state: Path) -> Path:
    """Return the path of the adapter's configuration: ``place``, or a file in it or next to the folder of shards.

    Raises:
        FileNotFoundError: there is no configuration.
    """
    candidates = [place] if place.is_file() else [place / CONFIG_NAME]
    if place.is_dir() and (place == state or place in state.parents):
        candidates += [state / CONFIG_NAME, state.parent / CONFIG_NAME, place.resolve().parent / CONFIG_NAME]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{place} holds no {CONFIG_NAME}, nor does the folder above: give adapter_config, for example of the run's "
            "output folder"
        )
    return found


def _require_known(config: Mapping[str, Any], path: Path) -> None:
    known = ("LORA", LoraXSType.REFLORA_DIST_LORA_XS.value)
    if config.get("peft_type") not in known:
        raise ValueError(f"{path} has peft_type={config.get('peft_type')!r}; LoRA, LoRA-XS and LoRA-SB are supported")


def _complete(tensors: dict[str, Tensor], config: Mapping[str, Any], folder: Path, state: Path) -> None:
    """Add the frozen tensors, which no training state holds, and make sure that no other tensor is missing."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    beside: set[str] = set()
    if path.is_file():
        with open_tensors(path) as file:
            modules = config.get("modules_to_save") or ()
            trained = (".lora_", ".trainable_tokens_delta", *(f".{name}." for name in modules))
            keys = {key for key in file.keys() if not is_spare(key)}  # noqa: SIM118
            beside = {key for key in keys if any(part in key for part in trained)}
            # A and B of LoRA-XS, and the embedding of a base whose vocabulary was resized
            frozen = [key for key in keys if key not in beside or re.search(r"\.lora_xs_[AB]\.", key)]
            tensors |= {key: file.get_tensor(key) for key in frozen if key not in tensors}
    partners: tuple[tuple[str, str], ...] = (
        ("lora_A.weight", "lora_B.weight"),
        ("lora_embedding_A", "lora_embedding_B"),
    )
    partners += (("lora_xs_R.weight", "lora_xs_A.weight"), ("lora_xs_R.weight", "lora_xs_B.weight"))
    wanted = set(beside)
    for one, other in (*partners, *((b, a) for a, b in partners)):
        wanted |= {key.removesuffix(one) + other for key in tensors if key.endswith(f".{one}")}
    broken = [key for key, tensor in sorted(tensors.items()) if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(f"{state} holds {broken[0]} with values that are not finite: export an earlier checkpoint")
    lacking = sorted(wanted - tensors.keys())
    if lacking:
        remedy = f"; it is frozen: put the run's {SAFETENSORS_WEIGHTS_NAME} beside {CONFIG_NAME}"
        raise ValueError(f"{state} lacks {lacking[0]}{remedy if '.lora_xs_' in lacking[0] else ''}")


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    save_file(dict(tensors), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True))
