"""What a merged model's folder has beside weights: configurations, code and the tokenizer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from .open_files import read_json

_COPIED = (".json", ".model", ".txt", ".py", ".jinja", ".tiktoken")
_TOKENIZER = ("token", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece", "sentencepiece")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer in a folder, by name."""
    return {p.name: p for p in folder.iterdir() if p.name.startswith(_TOKENIZER) and p.suffix in _COPIED}


def other_files(base: Path, trained: Path) -> dict[str, Path]:
    """Configurations and tokenizer of the base; the tokenizer of the other folder, which is what the adapter was
    trained with, goes before."""
    files = _of_base(base) | tokenizer_files(trained)
    for path in files.values():
        if path.suffix == ".json":
            read_json(path)
    return files


def require_fitting_tokenizer(files: Iterable[Path], base: Path, rows: int) -> None:
    """Refuse a tokenizer with ids for which the embedding has no rows, unless the base's own has them too.

    Args:
        files: of the tokenizer, and others.
        base: the base's folder.
        rows: of the embedding; 0 if the model has none.

    Raises:
        ValueError: it has; the message says what to do.
    """
    ids = _num_ids(files)
    if 0 < rows < ids and ids > _num_ids(_of_base(base).values()):
        raise ValueError(
            f"the adapter's tokenizer has {ids} ids and the merged embedding {rows} rows: tokens were added, and the "
            "adapter does not hold the embedding that was resized for them. Save the adapter anew with "
            "reflora_dist.checkpoints.training_state.save_adapter, or take the tokenizer's files out of its folder"
        )


def _of_base(base: Path) -> dict[str, Path]:
    return {
        p.name: p for p in base.iterdir() if p.suffix in _COPIED and p.is_file() and not p.name.endswith(".index.json")
    }


def _num_ids(files: Iterable[Path]) -> int:
    """One more than the tokenizer's last id; 0 if there is no tokenizer, or none that can be read."""
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            shutil.copyfile(path, Path(folder) / path.name)
        try:
            return 1 + max(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab().values())
        except Exception:  # a tokenizer's library raises what it likes; one with code of its own is not run
            return 0
