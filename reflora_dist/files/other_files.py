"""The files of a merged model's folder other than weights: configurations, code and the tokenizer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from .cache import KEY_FILE
from .open_files import read_json

_COPIED = (".json", ".model", ".txt", ".py", ".jinja", ".tiktoken")
_TOKENIZER = ("token", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece", "sentencepiece")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the tokenizer's files in a folder, by name."""
    return {p.name: p for p in folder.iterdir() if p.name.startswith(_TOKENIZER) and p.suffix in _COPIED}


def other_files(base: Path, trained: Path) -> dict[str, Path]:
    """Return configurations, code and tokenizer for a merged model, as paths by name.

    Args:
        base: the base model's folder.
        trained: the adapter's folder; the adapter was trained with its tokenizer, which replaces the base's.

    Raises:
        ValueError: a JSON file is damaged.
    """
    files = _of_base(base) | tokenizer_files(trained)
    for path in files.values():
        if path.suffix == ".json":
            read_json(path)
    return files


def require_fitting_tokenizer(files: Iterable[Path], base: Path, rows: int) -> None:
    """Refuse a tokenizer with ids beyond the embedding's rows, unless the base's own tokenizer has as many ids.

    Args:
        files: the tokenizer's files; other files may be among them.
        base: the base model's folder.
        rows: number of rows of the embedding; 0 if the model has none.

    Raises:
        ValueError: the tokenizer has such ids; the message names the remedy.
    """
    ids = _num_ids(files)
    if 0 < rows < ids and ids > _num_ids(_of_base(base).values()):
        raise ValueError(
            f"the adapter's tokenizer has {ids} ids and the merged embedding {rows} rows: tokens were added, and the "
            "adapter does not hold the embedding that was resized for them. Save the adapter anew with "
            "reflora_dist.checkpoints.training_state.save_adapter, or take the tokenizer's files out of its folder"
        )


def _of_base(base: Path) -> dict[str, Path]:
    files = {p.name: p for p in base.iterdir() if p.suffix in _COPIED and p.is_file()}
    # a merged model has an index of its own, and is not what the cache made
    return {name: path for name, path in files.items() if not name.endswith(".index.json") and name != KEY_FILE}


def _num_ids(files: Iterable[Path]) -> int:
    """Return one more than the tokenizer's largest id; 0 if no tokenizer can be read from the files."""
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            shutil.copyfile(path, Path(folder) / path.name)
        try:
            return 1 + max(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab().values())
        except Exception:  # tokenizers raise errors of any type, and custom code is not run
            return 0
