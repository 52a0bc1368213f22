"""Names that come out of files lead nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reflora_dist.export.consolidate import find_state
from reflora_dist.files.records import plain_name, require_files
from reflora_dist.files.stored_weights import INDEX_NAME, StoredWeights

SOURCE = Path("index.json")
_LEADING_AWAY = [
    "/etc/passwd",
    "../x",
    "a/../../x",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "C:x",
    "x\0y",
    7,
    None,
    ["x"],
    "a//b",
]


@pytest.mark.parametrize("name", _LEADING_AWAY)
def test_names_that_could_lead_away_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"index.json names the file .* no plain name inside its folder"):
        plain_name(name, SOURCE)


@given(st.text(max_size=12) | st.from_regex(r"(\.\.?/|/|\\)*[a-z.]*(/[a-z.]*)*", fullmatch=True))
def test_what_is_accepted_stays_inside(name: str) -> None:
    """However it is made: below the folder, and with folders never above it."""
    for with_folders in (False, True):
        try:
            plain_name(name, SOURCE, with_folders=with_folders)
        except ValueError:
            continue
        path = Path("/base") / name
        assert ".." not in path.parts and path.parts[:2] == ("/", "base") and len(path.parts) > 2
        assert with_folders or len(path.parts) == 3


def test_ordinary_names_are_accepted() -> None:
    assert plain_name("model-00001-of-00002.safetensors", SOURCE)
    assert plain_name("state/__0_0.distcp", SOURCE, with_folders=True)


@pytest.mark.parametrize("name", ["../rel.safetensors", "/abs.safetensors", "sub/x.safetensors", "model.bin", 3])
def test_an_index_that_leaves_its_folder_is_refused(name: object, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match=r"no plain name inside|no safetensors file"):
        StoredWeights(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": {}}}', "{"]
)
def test_a_damaged_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(ValueError, match=INDEX_NAME):
        StoredWeights(tmp_path)


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_an_index_that_is_left_over_does_not_count(shards_are_there: bool, tmp_path: Path) -> None:
    """transformers, too, takes model.safetensors where both are there."""
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    if shards_are_there:
        save_file({"x": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    weights = StoredWeights(tmp_path)
    assert weights.index is None and weights.read("x").tolist() == [1.0, 1.0]


def test_records_and_pointers_that_leave_their_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no plain name"):
        require_files(tmp_path, {"../x": 1})
    (tmp_path / "latest").write_text("../../elsewhere")
    with pytest.raises(ValueError, match=r"latest names the file .*no plain name"):
        find_state(tmp_path)
