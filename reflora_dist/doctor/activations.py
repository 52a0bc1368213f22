"""Estimate of the memory of forward and backward, from a run of both on tensors without data."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .base_model import build
from .options import PRECISIONS, DoctorOptions
from .setup import Setup

_DEPTHS = (2, 3)  # numbers of layers of two models; their difference is the cost of one layer


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of the storages that operations create, until each is freed.

    Attributes:
        live, peak: current and largest number of bytes. The model's own storages do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def activation_bytes(config: Any, options: DoctorOptions, setup: Setup) -> int:
    """Return the peak bytes of one micro-batch's forward and backward: activations, temporaries and gradients.

    Forward and backward run under torch's FakeTensorMode on models of two and of three layers, so that autograd itself
    decides what it saves. Each further layer is assumed to need as much as the third. CPU operators replace those of a
    GPU (attention replaces its memory-efficient kernel), so the result is an estimate.

    Raises:
        ValueError: the model's configuration has no number of layers, or the model does not run this way.
    """
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if depth is None:
        raise ValueError(f"{type(config).__name__} has no num_hidden_layers")
    try:
        first, second = (_peak(_shallow(config, layers), options, setup) for layers in _DEPTHS)
    except Exception as error:  # some operator has no shape rule
        raise ValueError(f"forward and backward without data failed: {type(error).__name__}: {error}") from error
    return first + (depth - _DEPTHS[0]) * (second - first)


def _shallow(config: Any, layers: int) -> Any:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        missing = layers - len(text.layer_types)
        text.layer_types = [*text.layer_types[:layers], *missing * text.layer_types[-1:]]
    return shallow


def _peak(config: Any, options: DoctorOptions, setup: Setup) -> int:
    dtype = getattr(torch, PRECISIONS[setup.precision])
    model = build(config, options, dtype, setup.tall_adapters)
    if setup.is_zero:  # DeepSpeed casts the factors too, and needs no autocast
        model.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake_cpu(model)
        model.train()
        if setup.activation_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = torch.zeros(setup.micro_batch_size, options.sequence_length, dtype=torch.long)
        autocast = torch.autocast("cpu", dtype, enabled=setup.precision != "no" and not setup.is_zero)
        with PeakMemory(model) as memory:
            with autocast:
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        return memory.peak


def _to_fake_cpu(model: PeftModel) -> None:
    """Move the model from the meta device, which has no autocast and no fused attention."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
