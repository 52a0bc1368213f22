"""Configuration files that come with the package are found by name, and a user's own file is never replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers import configurations
from launchers.configurations import shipped_configuration
from launchers.training.arguments import FinetuneArguments
from tests.support.launchers import REPOSITORY


@pytest.mark.parametrize("name", ["zero3", "zero3.json", "ds_configs/zero3.json"])
def test_a_file_is_found_by_its_name(name: str) -> None:
    assert shipped_configuration(name) == REPOSITORY / "ds_configs" / "zero3.json"
    with pytest.raises(ValueError, match="is no configuration of this package"):
        shipped_configuration(name, suffix=".yaml")


def test_a_file_in_another_folder_is_not_meant() -> None:
    with pytest.raises(ValueError, match=r"'mine/zero3.json' is no .*: it has .*ds_configs/zero3.json"):
        shipped_configuration("mine/zero3.json")


def test_two_files_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in (("a", "zero3.json"), ("b", "zero3.yaml")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    monkeypatch.setattr(configurations, "_FOLDERS", {"a": tmp_path / "a", "b": tmp_path / "b"})
    with pytest.raises(ValueError, match=r"'zero3' is ambiguous: give a/zero3.json or b/zero3.yaml"):
        shipped_configuration("zero3")
    assert shipped_configuration("zero3", suffix=".yaml") == tmp_path / "b" / "zero3.yaml"


def test_finetunes_option_takes_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"ds_configs/zero3.json' needs a launcher"):
        FinetuneArguments(deepspeed="zero3")
    with pytest.raises(ValueError, match=r"deepspeed='zero9': no such file; .*ds_configs/zero1.json"):
        FinetuneArguments(deepspeed="zero9")
    monkeypatch.chdir(tmp_path)
    Path("zero3").touch()
    with pytest.raises(ValueError, match=r"deepspeed='zero3' needs a launcher"):
        FinetuneArguments(deepspeed="zero3")
