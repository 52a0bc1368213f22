"""finetune.py's base is loaded in the dtype that training computes in, whoever says it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launchers.finetune import computed_dtype, load_model
from launchers.training.options import parse_options
from tests.support.launchers import micro_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(micro_model(tmp_path_factory.mktemp("precision") / "model"))


@pytest.mark.parametrize(
    ("configured", "options", "expected"),
    [
        ("no", [], torch.float32),
        ("no", ["--bf16=True"], torch.bfloat16),
        ("bf16", [], torch.bfloat16),
        ("bf16", ["--bf16=False"], torch.bfloat16),  # which does not switch off what accelerate has been told
        ("fp16", ["--bf16=True"], torch.bfloat16),
        ("bf16", ["--model_dtype=float32"], torch.float32),
    ],
)
def test_the_base_is_loaded_in_what_training_computes_in(
    model: str, configured: str, options: list[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate's launcher tells its configuration's ``mixed_precision``."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", configured)
    parsed = parse_options([f"--model={model}", f"--output_dir={model}/out", "--use_cpu=True", *options])
    assert next(load_model(model, parsed).parameters()).dtype == expected


def test_a_4_bit_base_computes_in_it_too(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    parsed = parse_options([f"--model={model}", f"--output_dir={model}/out", "--use_cpu=True", "--load_in_4bit=True"])
    packed = load_model(model, parsed).model.layers[0].mlp.up_proj.weight
    assert packed.quant_state.dtype == packed.dtype == torch.bfloat16


def test_fp16_of_accelerate_needs_a_gpu(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision=fp16 in accelerate's configuration needs a GPU"):
        parse_options([f"--model={model}", f"--output_dir={model}/out", "--use_cpu=True"])
    on_a_gpu = SimpleNamespace(deepspeed=None, bf16=False, fp16=False, mixed_precision="fp16")
    assert computed_dtype(on_a_gpu) == "float16"


@pytest.mark.parametrize(("bf16", "expected"), [(False, None), (True, "bfloat16")])
def test_a_deepspeed_file_is_filled_in_by_the_options_alone(bf16: bool, expected: str | None) -> None:
    arguments = SimpleNamespace(deepspeed="zero3.json", bf16=bf16, fp16=False, mixed_precision="bf16")
    assert computed_dtype(arguments) == expected
