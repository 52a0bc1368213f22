"""Files that libraries parse are opened in one place, whose errors name the file, the cause and the remedy."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reflora_dist.files.open_files import (
    cause_of,
    read_json,
    read_peft_config,
    read_peft_weights,
    read_tensors,
    readable,
)
from tests.support.launchers import REPOSITORY

# the doctor's findings name the file themselves, and its JSON and YAML, as those of --config, must hold no key twice
_MAY_OPEN = {"reflora_dist/files/open_files.py", "reflora_dist/files/safe_pickles.py", "reflora_dist/doctor/files.py"}
_MAY_OPEN |= {"launchers/training/run_file.py"}
_OPENERS = {"safe_open", "load_file", "load_peft_weights", "yaml"}
# of a tokenizer that was just written; of a file whose checksum was compared
_MAY_LOAD = {"reflora_dist/files/base_files.py", "reflora_dist/files/open_files.py", "launchers/data/embedded.py"}
_MAY_LOAD |= {"reflora_dist/files/smollm2.py"}
_MAY_LOAD |= {"reflora_dist/doctor/base_model.py", "launchers/evaluation/generation.py"}
# the base's configuration, to compare; a tokenizer that was copied together
_MAY_LOAD |= {"reflora_dist/checkpoints/embeddings.py", "reflora_dist/files/other_files.py"}


def _modules() -> Iterator[tuple[str, ast.AST]]:
    for folder in ("reflora_dist", "launchers"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text())


def _opens(tree: ast.AST) -> list[str]:
    """What a module calls or imports that opens files."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name in _OPENERS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = f"{ast.unparse(node.func.value)}.{node.func.attr}"
            reads = any(isinstance(part, ast.Attribute) and part.attr == "read_text" for part in ast.walk(node))
            if name in ("json.load", "torch.load", "pickle.load") or (name == "json.loads" and reads):
                found.append(name)
    return found


def test_no_other_module_opens_them() -> None:
    found = {name: opens for name, tree in _modules() if name not in _MAY_OPEN and (opens := _opens(tree))}
    assert not found
    assert {name for name, tree in _modules() if _opens(tree)} == _MAY_OPEN  # the search finds what there is


def test_no_other_module_has_a_library_open_a_model() -> None:
    found = {
        name
        for name, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    }
    assert found == _MAY_LOAD


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "JSONDecodeError: Expecting value"),
        ("[" * 100_000, "RecursionError"),
        ("[1]", r"holds \[1\] where a JSON object is wanted"),
        ("null", "holds None where a JSON object is wanted"),
    ],
    ids=["empty", "deep", "list", "null"],
)
def test_json_that_is_no_object(content: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"file\.json .*{cause}.*: load an earlier one"):
        read_json(path, "load an earlier one")


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.json cannot be read \(FileNotFoundError"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read \(FileNotFoundError"):
        read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        read_peft_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        read_peft_weights(tmp_path)


def test_an_unreadable_bin_is_named_without_torchs_advice(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle" * 50)
    with pytest.raises(ValueError, match=r"adapter_model\.bin cannot be read") as raised:
        read_peft_weights(tmp_path)
    assert "weights_only" not in str(raised.value) and "get it anew" in str(raised.value)


def test_what_a_pickle_wants_called_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": os.mkdir}, path)
    with pytest.raises(pickle.UnpicklingError) as raised:
        torch.load(path, weights_only=True)
    assert cause_of(raised.value) == "it wants posix.mkdir called, which no file of this kind needs"


def test_a_title_brings_its_line() -> None:
    assert cause_of(TypeError("Bad field:\n  it is 3\nmore")) == "TypeError: Bad field: it is 3"
    with (
        pytest.raises(ValueError, match=r"^f cannot be read \(KeyError: 'x'\): it is damaged, get it anew$"),
        readable("f"),
    ):
        raise KeyError("x")


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_a_lack_of_memory_is_no_damage(error: Exception) -> None:
    with pytest.raises(type(error), match="no room"), readable("model.safetensors"):
        raise error


def test_a_file_that_may_not_be_read_is_no_damage() -> None:
    message = r"^a\.json cannot be read \(PermissionError: .*\): give this user the right to read it$"
    with pytest.raises(ValueError, match=message), readable("a.json"):
        raise PermissionError("denied")
