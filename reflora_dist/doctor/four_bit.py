"""Size of a base in 4 bits: quantized while loading (``finetune.py --load_in_4bit``) or in the model's checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from .base_model import MetaModel, Parameter
from .findings import Findings
from .options import PRECISIONS, DoctorOptions

_BLOCK, _NESTED_BLOCK = 64, 256  # elements that share a scale; scales that share a nested scale
_CODES, _NESTED_CODES = 16, 256  # entries of the lookup tables that each weight has
_FLOAT32 = 4


class FourBit(NamedTuple):
    """How weights are packed.

    Attributes:
        nested: whether the scales are quantized as well (double quantization).
    """

    nested: bool


def four_bit(model_config: Any, options: DoctorOptions, precision: str, findings: Findings) -> FourBit | None:
    """Return how the base is quantized, or None; add problems to the findings."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return FourBit(nested=True) if options.load_in_4bit else None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if not stored.get("load_in_4bit"):
        method = stored.get("quant_method")
        findings.warning(
            "--model",
            f"its weights are quantized ({method}), and sized as if they were not",
            "the model that it was made from, with --load_in_4bit True, is sized as it is",
        )
        return None
    storage, computed = stored.get("bnb_4bit_quant_storage", "uint8"), PRECISIONS[precision]
    if storage != computed:
        findings.warning(
            "--model",
            f"bnb_4bit_quant_storage={storage!r}: FSDP shards no integers, and a cast of parameters to {computed} "
            "destroys other floats",
            "take the model that it was made from, with --load_in_4bit True",
        )
    return FourBit(nested=bool(stored.get("bnb_4bit_use_double_quant")))


def pack(model: MetaModel, packing: FourBit, element_size: int) -> MetaModel:
    """Return the model with the weights of linear layers packed, two values per byte.

    The packed bytes are stored as elements of the dtype in which the model computes.

    Args:
        model: the model before packing.
        packing: how to pack.
        element_size: bytes of that dtype.
    """
    weights = [parameter for parameter in model.parameters if parameter.quantizable]
    return dataclasses.replace(
        model,
        parameters=[_packed(p, element_size) if p.quantizable else p for p in model.parameters],
        scale_bytes=sum(_scale_bytes(weight.numel, packing.nested) for weight in weights),
        unpacked_numel=max((weight.numel for weight in weights), default=0),
    )


def _packed(parameter: Parameter, element_size: int) -> Parameter:
    size = -(-parameter.numel // 2)
    return dataclasses.replace(parameter, shape=(-(-size // element_size), 1))


def _scale_bytes(numel: int, nested: bool) -> int:
    scales = -(-numel // _BLOCK)
    if not nested:
        return (scales + _CODES) * _FLOAT32
    return scales + (-(-scales // _NESTED_BLOCK) + _CODES + _NESTED_CODES + 1) * _FLOAT32  # and an offset
