"""Merge of an adapter into its base, one weight at a time, without holding the model in memory.

The PEFT model is built from the configurations and the adapter's file, with its base on the meta device. So PEFT itself
decides which weights are adapted and how. PEFT's own layers merge, one after the other, each with the base weight that
it needs. The result equals that of ``merge_and_unload`` bit by bit.
"""

from __future__ import annotations

import collections
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checkpoints.embeddings import vocabulary_layers
from ..checkpoints.merged_record import merged_header, refuse_merged_twice
from ..checkpoints.start_file import changes_base, saved_mark
from ..engines.bare_base import require_no_adapter
from ..files.open_files import read_peft_config, read_peft_weights
from ..files.other_files import other_files, require_fitting_tokenizer
from ..files.output_folder import new_folder, require_empty, require_space
from ..files.stored_weights import INDEX_NAME, Entry, StoredWeights, find_model, write_file
from ..lora_sb.config import LoraXSConfig
from ..starts.convert import convert_changed_base
from .empty_model import ADAPTER, empty_base, with_adapter
from .merge_in_memory import merge_in_memory


def merge_adapter(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer_dir: str | Path | None = None,
    progress: bool = False,
) -> None:
    """Merge an adapter into a base and write the result of PEFT's ``merge_and_unload()``. One process, no ranks.

    Files, names and order of the weights are the base's; ``from_pretrained(output_dir)`` loads them. Memory holds the
    adapter, one weight of the base and its change; input files are memory-mapped. An adapter of parameters
    (``target_parameters``) needs the whole model in memory.

    The result equals PEFT's result on a CPU to the last bit, with one exception. If the adapter changes an embedding
    that is tied to the head, PEFT changes the head too, so its merged model differs from the trained one. Here the two
    are untied.

    Args:
        adapter_dir: folder of a LoRA (also DoRA, rsLoRA, patterns, ``modules_to_save``), LoRA-XS or LoRA-SB adapter in
            PEFT's format. An adapter of a changed base (:func:`reflora_dist.convert_adapter`) is converted first.
        output_dir: folder of the result; must not exist, or be empty. It stays as it was if anything fails.
        base: local folder or hub name of the base; by default the one that the adapter's configuration names.
        dtype: dtype to which the base is rounded before the merge, as by ``from_pretrained(dtype=...)``; None keeps
            the stored dtypes.
        tokenizer_dir: folder whose tokenizer is used instead of the base's; by default ``adapter_dir``.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, the adapter does not fit the base, cannot be merged
            or is already merged, the tokenizer has ids beyond the merged embedding's rows, ``output_dir`` is not
            empty, or the disk is too small.
    """
    target = Path(output_dir)
    require_empty(target)
    with _ordinary_adapter(Path(adapter_dir)) as source:
        config = _read_config(source)
        name = base or config.base_model_name_or_path
        if not name:
            raise ValueError(f"{adapter_dir} does not name its base: give it")
        folder = find_model(name, None if base else config.revision)
        require_no_adapter(str(folder), "merge it into the base that it names first, and give the merged model as base")
        refuse_merged_twice(folder, adapter_dir)
        tokenizer = Path(tokenizer_dir or adapter_dir)
        if getattr(config, "target_parameters", None):
            tensors = read_peft_weights(source)
            merge_in_memory(source, config, tensors, folder, target, dtype=dtype, tokenizer=tokenizer)
            return
        stored, merged = StoredWeights(folder), merged_header(folder, Path(adapter_dir))
        merge = _Merge(source, config, stored, dtype)
        files = merge.files()
        copied = other_files(stored.folder, tokenizer)
        require_fitting_tokenizer(copied.values(), stored.folder, merge.vocabulary)
        total = sum(entry.num_bytes for entries in files.values() for entry in entries)
        require_space(target, total + sum(path.stat().st_size for path in copied.values()))
        with new_folder(target) as part, tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            for file, entries in files.items():
                bar.set_description(file)
                write_file(part / file, entries, {**stored.metadata(file), **merged}, bar.update)
            for file, path in copied.items():
                shutil.copyfile(path, part / file)
            _write_index(part, stored, files)
            merge.write_config(part)


class _Source(NamedTuple):
    """The source of a parameter of the merged model.

    Attributes:
        layer: the PEFT layer that merges into it; None if no adapter does.
        module, name: the module that holds the parameter, and its name there.
    """

    layer: Any
    module: nn.Module
    name: str

    @property
    def parameter(self) -> Tensor:
        return self.module._parameters[self.name]  # type: ignore[return-value]

    @property
    def changed(self) -> bool:
        """Whether the adapter changes or contains the parameter."""
        return self.layer is not None or not self.parameter.is_meta


class _Merge:
    """The merged model's tensors, each computed when it is written.

    Args:
        source: the adapter's folder.
        config: the adapter's configuration.
        stored: the base's weights.
        dtype: dtype of the result; None keeps the stored dtypes.
    """

    def __init__(self, source: Path, config: PeftConfig, stored: StoredWeights, dtype: torch.dtype | None) -> None:
        self.stored, self.dtype = stored, dtype
        tensors = read_peft_weights(source)
        base = empty_base(stored, source, config, tensors, dtype)
        self.config, self.architecture = base.config, type(base).__name__
        names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
        self.tied = _tied_names(base)
        embeddings = {
            id(parameter) for module in vocabulary_layers(base) for parameter in module.parameters(recurse=False)
        }
        self.embedding_names = {n for n, p in base.named_parameters(remove_duplicate=False) if id(p) in embeddings}
        self.names = _names_of_keys(stored, names, base.base_model_prefix)
        self.keys = {name: key for key, name in self.names.items()}
        self._need_not_be_stored = tuple(getattr(base, "_keys_to_ignore_on_load_missing", None) or ())
        model = with_adapter(base, config, tensors, source)
        root = model.get_base_model()
        self.sources = {name: _find_source(root, name) for name in names}
        self.untied = self._separated()
        self.resized = any(
            self.sources[name].parameter.shape != stored.specs[key][0]
            for key, name in self.names.items()
            if name in self.embedding_names
        )

    @property
    def vocabulary(self) -> int:
        """The number of rows of the merged model's embedding, or of its head if that has fewer."""
        return min((self.sources[name].parameter.shape[0] for name in self.embedding_names), default=0)

    def _separated(self) -> set[str]:
        """Return the names of parameters that are tied in the base and differ after the merge."""
        untied: set[str] = set()
        for group in self.tied:
            identities = {id(self.sources[n].layer or self.sources[n].parameter) for n in group}
            if len(identities) > 1:
                if not self.embedding_names.issuperset(group):
                    raise ValueError(f"the adapter changes one of {group}, which the base shares: leave it out")
                untied.update(group)
        return untied

    def files(self) -> dict[str, list[Entry]]:
        """Return the entries of each file of the merged model.

        Each file has the same entries as the base's; entries that the base lacks go into the last one.
        """
        files = {file: [self._entry(key) for key in keys] for file, keys in self.stored.keys.items()}
        files[list(files)[-1]] += [self._added(name) for name in self._missing()]
        return files

    def _missing(self) -> list[str]:
        """Return the parameters that the base's files lack and the merged model's files need."""
        elsewhere = {name for group in self.tied for name in group if any(other in self.keys for other in group)}
        missing, absent = [], []
        for name, source in self.sources.items():
            if name in self.keys or (name in elsewhere and name not in self.untied):
                continue
            if source.layer is not None and name not in elsewhere:
                raise ValueError(
                    f"{name} is adapted, but {self.stored.folder} holds no weight of this name: transformers renames "
                    "or joins this model's weights as it loads them, which merging file by file cannot follow; use "
                    "PEFT's merge_and_unload"
                )
            if source.changed or name in self.untied:
                missing.append(name)
            elif not any(re.search(pattern, name) for pattern in self._need_not_be_stored):
                absent.append(name)
        self._refuse_a_base_that_lacks(absent)
        return missing

    def _refuse_a_base_that_lacks(self, absent: Sequence[str]) -> None:
        # weights that transformers joins or renames have unknown keys, but the same number of elements in total
        unknown = sum(math.prod(shape) for key, (shape, _) in self.stored.specs.items() if key not in self.names)
        if sum(self.sources[name].parameter.numel() for name in absent) > unknown:
            raise ValueError(
                f"{self.stored.folder} lacks {len(absent)} of the model's weights ({absent[0]}, ...): download the "
                "model again"
            )

    def _entry(self, key: str) -> Entry:
        shape, stored_dtype = self.stored.specs[key]
        dtype = self.dtype if self.dtype is not None and stored_dtype.is_floating_point else stored_dtype
        name = self.names.get(key)
        if name is None:  # no parameter of the model: a buffer or an unused tensor
            return Entry(key=key, shape=shape, dtype=dtype, load=lambda: self.stored.read(key).to(dtype))
        present = tuple(self.sources[name].parameter.shape)
        if present != shape and not self._is_resized(name):
            raise ValueError(f"{key} is {shape} in {self.stored.folder} and {present} for the adapter: another base")
        shape = present
        return Entry(key=key, shape=shape, dtype=dtype, load=lambda: self._value(name, dtype))

    def _is_resized(self, name: str) -> bool:
        """Return whether the adapter brings its own embedding or head, whose size may differ from the base's."""
        parameter = self.sources[name].parameter
        if name not in self.embedding_names:
            return False
        if parameter.is_meta:
            raise ValueError(
                f"the adapter was trained with a vocabulary of {parameter.shape[0]}, which is not that of the base in "
                f"{self.stored.folder}, and lacks {name}: save it anew with save_adapter"
            )
        return True

    def _added(self, name: str) -> Entry:
        parameter = self.sources[name].parameter
        dtype = self.dtype or parameter.dtype
        return Entry(key=name, shape=tuple(parameter.shape), dtype=dtype, load=lambda: self._value(name, dtype))

    def _value(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a parameter of the merged model."""
        source = self.sources[name]
        if source.layer is None:
            return self._unmerged(name, dtype)
        prefix = name.removesuffix(source.name)
        changed = {"weight", "bias"} if _has_bias(source.layer) else {"weight"}
        if source.name not in changed:
            return self._unmerged(name, dtype)
        values = {each: self._unmerged(prefix + each, dtype) for each in changed}
        merged = _merged(source.layer, source.module, values)[source.name]
        if not torch.isfinite(merged).all():
            raise ValueError(f"{name} is not finite after the merge: the adapter or the base is broken")
        return merged

    def _unmerged(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a parameter before the merge: a new copy of the adapter's own tensor, or of the base's."""
        parameter = self.sources[name].parameter
        if not parameter.is_meta:
            return parameter.detach().to(dtype, copy=True)
        group = next((group for group in self.tied if name in group), [name])
        key = next(self.keys[other] for other in (name, *group) if other in self.keys)
        return self.stored.read(key).to(dtype, copy=True)

    def write_config(self, folder: Path) -> None:
        """Write the merged model's configuration if it differs from the base's."""
        settings: dict[str, Any] = {}
        if self.dtype is not None:
            settings["dtype"] = self.dtype
        if self.untied:
            settings["tie_word_embeddings"] = False
        if self.config.architectures != [self.architecture]:
            settings["architectures"] = [self.architecture]
        if settings or self.resized:  # a resized vocabulary is already in the configuration
            for setting, value in settings.items():
                setattr(self.config, setting, value)
            self.config.save_pretrained(folder)


# --- names ---


def _tied_names(base: nn.Module) -> list[list[str]]:
    groups = collections.defaultdict(list)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _names_of_keys(stored: StoredWeights, names: list[str], prefix: str) -> dict[str, str]:
    """Return the parameter's name for each key of the base's files; keys of a bare model lack the prefix."""
    known, found = set(names), {}
    for key in stored.specs:
        candidates = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
        name = next((candidate for candidate in candidates if candidate in known), None)
        if name is not None:
            found[key] = name
    return found


def _find_source(root: nn.Module, name: str) -> _Source:
    """Find a parameter of the base by its name, through the layers that PEFT inserted."""
    *path, leaf = name.split(".")
    module, layer = root, None
    for part in path:
        module, layer = getattr(module, part), None
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[ADAPTER]
        if isinstance(module, BaseTunerLayer):
            module, layer = module.get_base_layer(), module
    return _Source(layer, module, leaf)


def _has_bias(layer: Any) -> bool:
    return bool(getattr(layer, "lora_bias", {}).get(ADAPTER, False))


def _merged(layer: Any, module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run PEFT's own merge on a layer that holds its base's parameters only during this call."""
    empty = {name: module._parameters[name] for name in values}
    try:
        for name, value in values.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        layer.merge(adapter_names=[ADAPTER])
        return {name: module._parameters[name].data for name in values}  # type: ignore[union-attr]
    finally:
        layer.merged_adapters.clear()
        module._parameters.update(empty)


# --- files ---


def _read_config(source: Path) -> PeftConfig:
    config = read_peft_config(source)
    if not isinstance(config, (LoraConfig, LoraXSConfig)):
        raise ValueError(f"{source} holds a {config.peft_type} adapter; LoRA, LoRA-XS and LoRA-SB can be merged")
    start = getattr(config, "init_lora_weights", True)
    if changes_base(start):
        raise ValueError(
            f"{source} was started by PEFT with init_lora_weights={start!r}, which changed its base: convert it with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if getattr(config, "layer_replication", None):
        raise ValueError(f"{source} replicates layers (layer_replication), which cannot be merged into the base")
    config.inference_mode = True
    return config


@contextmanager
def _ordinary_adapter(adapter_dir: Path) -> Iterator[Path]:
    """Yield the folder of an adapter on the original base: ``adapter_dir``, or a temporary converted copy."""
    if not (adapter_dir / CONFIG_NAME).is_file():
        model = ", and is a model by itself" if (adapter_dir / "config.json").is_file() else ""
        raise ValueError(f"{adapter_dir} holds no adapter in PEFT's format: it has no {CONFIG_NAME}{model}")
    if saved_mark(adapter_dir) is None:
        yield adapter_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        convert_changed_base(adapter_dir, folder)
        yield Path(folder)


def _write_index(folder: Path, stored: StoredWeights, files: dict[str, list[Entry]]) -> None:
    if stored.index is None:
        return
    entries = [entry for each in files.values() for entry in each]
    index = dict(stored.index)
    index["metadata"] = {**index.get("metadata", {}), "total_size": sum(entry.num_bytes for entry in entries)}
    index["weight_map"] = {entry.key: file for file, each in files.items() for entry in each}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
