"""The reference that ships: drawn from seeds as the whole one stores it, and refused where they draw something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import workloads
from tests.support.launchers import REPOSITORY
from tests.support.workloads import load_reference, reference_dir, worst_factor_error

SHIPPED = REPOSITORY / "tests" / "support" / "reference"


@pytest.mark.skipif(reference_dir() == SHIPPED, reason="no whole reference beside the repository")
def test_the_reference_that_ships_is_the_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_reference()
    monkeypatch.setenv("REFLORA_REFERENCE", str(SHIPPED))
    shipped = load_reference()
    assert shipped.factors.keys() == {"lora", "reflora", "reflora-s", "lora-rite"}
    assert all(shipped.cases[name] == whole.cases[name] for name in shipped.cases)
    assert (shipped.llama, shipped.lora, shipped.settings) == (whole.llama, whole.lora, whole.settings)
    assert torch.equal(shipped.batches, whole.batches)
    # torch's generator rounds in another way on another kind of processor
    assert worst_factor_error(dict(shipped.base_weights), dict(whole.base_weights)) < 1e-6
    assert worst_factor_error(shipped.initial_factors, whole.initial_factors) < 1e-6
    for name, factors in shipped.factors.items():
        assert worst_factor_error(factors, whole.factors[name]) < 1e-5


def test_a_clone_with_nothing_beside_it_has_a_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REFLORA_REFERENCE", raising=False)
    monkeypatch.setattr(workloads, "__file__", str(tmp_path / "clone" / "tests" / "support" / "workloads.py"))
    assert reference_dir() == tmp_path / "clone" / "tests" / "support" / "reference"


@pytest.mark.parametrize("part", ["base", "factors", "batches"])
def test_another_start_is_refused(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a release of torch would draw it whose generator is another one."""
    folder = shutil.copytree(SHIPPED, tmp_path / "reference")
    meta = json.loads((folder / "meta.json").read_text())
    meta["drawn"][part]["seed"] += 1
    (folder / "meta.json").write_text(json.dumps(meta))
    monkeypatch.setenv("REFLORA_REFERENCE", str(folder))
    with pytest.raises(ValueError, match=rf"{part} drawn from seed \d+ have norm .* constraints.txt"):
        load_reference()
