"""Whether the kernels are used is decided by how far they are from the plain code, here by figures made up."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch

from reflora_dist.algebra import kernel_check

CPU = torch.device("cpu")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The errors that the check of every size finds: the check itself needs a GPU and Triton."""
    errors: dict[str, Any] = {"Grams and products": 1e-9, "inverses": 1e-12, "S": 1e-8}
    check = types.SimpleNamespace(
        errors=lambda lora_rank, device: errors["of"](lora_rank) if "of" in errors else errors
    )
    monkeypatch.setitem(sys.modules, "reflora_dist.algebra.kernel_errors", check)
    monkeypatch.setattr(kernel_check, "usable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    kernel_check._agree_with_torch.cache_clear()
    yield errors
    kernel_check._agree_with_torch.cache_clear()


def test_small_errors_are_accepted(found: dict[str, Any]) -> None:
    assert kernel_check.kernels_work([8, 16, 300], CPU)


@pytest.mark.parametrize("what", ["Grams and products", "inverses", "S"])
@pytest.mark.parametrize("error", [1e-3, math.nan, math.inf])
def test_one_large_error_is_enough(found: dict[str, Any], what: str, error: float) -> None:
    found[what] = error
    with pytest.warns(
        UserWarning, match=rf"kernels for r=16 are not used on a GPU, plain torch code is: {what} differ"
    ):
        assert not kernel_check.kernels_work([16], CPU)


def test_what_a_compiler_says_is_told(found: dict[str, Any]) -> None:
    def fail(lora_rank: int) -> Any:
        raise RuntimeError("no such instruction\nand more")

    found["of"] = fail
    with pytest.warns(UserWarning, match=r"kernels for r=128 .*RuntimeError: no such instruction$"):
        assert not kernel_check.kernels_work([256], CPU)
