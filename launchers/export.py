"""Export a trained adapter for plain PEFT, or merge it into its base.

    python launchers/export.py --adapter outputs/run/checkpoint-500 --output_dir adapter    # of a sharded checkpoint
    python launchers/export.py --adapter outputs/run --output_dir merged --merge            # into the adapter's base

The script is one process on a CPU, without a launcher. ``--adapter`` is a folder with an adapter in PEFT's format, or a
checkpoint with a sharded state: DCP's (FSDP2, FSDP1, DDP), DeepSpeed's of ZeRO-1 to 3, or a universal one.
"""

from __future__ import annotations

import logging
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    runpy.run_module("launchers.export", run_name="__main__", alter_sys=True)
    raise SystemExit

from reflora_dist.command_line.help import answer_help
from reflora_dist.command_line.parse import parse_into_dataclasses

from .options import ExportOptions

if __name__ == "__main__":
    answer_help(__doc__, {"options": ExportOptions})  # before torch is imported, which takes seconds

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import HfArgumentParser

from reflora_dist.checkpoints.adapter_files import require_tensors
from reflora_dist.export.consolidate import CONFIG_NAME, consolidate_adapter, find_config, find_state
from reflora_dist.export.convert import convert_adapter, is_convertible
from reflora_dist.export.merge import merge_adapter
from reflora_dist.files.open_files import read_json, read_tensors
from reflora_dist.files.other_files import tokenizer_files
from reflora_dist.files.output_folder import new_folder, require_empty
from reflora_dist.files.smollm2 import resolve_model


def export(options: ExportOptions) -> None:
    """Write the adapter or the merged model.

    Raises:
        OSError, ValueError: a file is missing or damaged, or cannot be written; see the called functions.
    """
    output = Path(options.output_dir)
    require_empty(output)
    _refuse_unused(options)
    if not options.merge:
        export_adapter(options, output)
        for name, path in tokenizer_files(tokenizer_folder(options)).items():
            shutil.copyfile(path, output / name)
        return
    base = resolve_model(options.model) if options.model else None
    dtype = None if options.model_dtype == "auto" else getattr(torch, options.model_dtype)
    with adapter_folder(options) as folder:
        tokenizer = tokenizer_folder(options)
        merge_adapter(folder, output, base=base, dtype=dtype, tokenizer_dir=tokenizer, progress=True)


def _refuse_unused(options: ExportOptions) -> None:
    """Refuse options for sharded checkpoints if the adapter is in PEFT's format."""
    source = Path(options.adapter)
    if sharded_state(options) is not None or not (source / CONFIG_NAME).is_file():
        return
    for name, default in (("adapter_config", None), ("adapter_name", "default")):
        if getattr(options, name) != default:
            raise ValueError(
                f"{name}={getattr(options, name)!r} means nothing here: {source} holds an adapter in PEFT's format and "
                "no sharded state; drop it"
            )


def export_adapter(options: ExportOptions, output: Path) -> None:
    """Write an ordinary adapter, which plain PEFT loads onto the original base."""
    source = Path(options.adapter)
    if sharded_state(options) is not None:
        _consolidate(options, output)
    elif (source / CONFIG_NAME).is_file() and is_convertible(source):
        with new_folder(output) as part:
            convert_adapter(source, part)
    elif has_adapter(source) and find_state(source) is not None:
        read_json(source / CONFIG_NAME)
        tensors = read_tensors(source / SAFETENSORS_WEIGHTS_NAME)
        require_tensors(source / SAFETENSORS_WEIGHTS_NAME, tensors, tensors or {"any"}, tensors)
        with new_folder(output) as part:
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
                shutil.copyfile(source / name, part / name)
    elif (source / CONFIG_NAME).is_file():
        raise ValueError(f"adapter={options.adapter!r} is in PEFT's format already: add --merge, or copy the folder")
    else:
        is_model = (source / "config.json").is_file()
        what = "is a model by itself" if is_model else "holds neither an adapter_config.json nor a sharded state"
        raise ValueError(f"adapter={options.adapter!r} {what}: give the adapter that was trained")


@contextmanager
def adapter_folder(options: ExportOptions) -> Iterator[Path]:
    """Yield a folder with the adapter in PEFT's format, a temporary one if the checkpoint is sharded."""
    if sharded_state(options) is None:
        yield Path(options.adapter)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        _consolidate(options, folder)
        yield folder


def has_adapter(folder: Path) -> bool:
    """Return whether the folder has an adapter in PEFT's format."""
    return (folder / CONFIG_NAME).is_file() and (folder / SAFETENSORS_WEIGHTS_NAME).is_file()


def sharded_state(options: ExportOptions) -> Path | None:
    """Return the folder of shards to read, or None if an adapter's file lies beside them and no option asks for shards.

    That file holds only tensors, while some shards are pickles.
    """
    source = Path(options.adapter)
    named = options.adapter_name != "default" or options.adapter_config is not None
    return find_state(source) if options.from_state or named or not has_adapter(source) else None


def _consolidate(options: ExportOptions, output: Path) -> None:
    consolidate_adapter(
        options.adapter,
        output,
        adapter_config=options.adapter_config,
        adapter=options.adapter_name,
        trust_pickles=options.trust_pickles,
    )


def tokenizer_folder(options: ExportOptions) -> Path:
    """Return the folder with the adapter's tokenizer: the checkpoint, or the folder of its configuration."""
    source = Path(options.adapter)
    state = sharded_state(options)
    if state is None:
        return source
    config = find_config(Path(options.adapter_config or source), state)
    return next((folder for folder in (source, state.parent, config.parent) if tokenizer_files(folder)), source)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        (options,) = parse_into_dataclasses(HfArgumentParser(ExportOptions), argv)  # type: ignore[arg-type]
        export(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"export.py: error: {error}") from error
    size = sum(path.stat().st_size for path in Path(options.output_dir).iterdir())
    print(f"{'merged model' if options.merge else 'adapter'}: {options.output_dir} ({size / 1e6:,.1f} MB)")


if __name__ == "__main__":
    main()
