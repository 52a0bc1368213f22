"""What the doctor is asked about."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from tests.support.doctor import SMALL


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**SMALL).save_pretrained(folder)
    return str(folder)
