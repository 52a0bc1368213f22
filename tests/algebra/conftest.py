"""A process whose Triton interprets kernels."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_LIMIT = 180  # seconds for one call, many times what it takes


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process whose Triton interprets kernels, which it settles when it is imported."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}.items():
            environment.setenv(name, value)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield lambda function, *arguments: pool.apply_async(function, arguments).get(_LIMIT)
