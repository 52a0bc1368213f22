"""Tall storage of lora_A, ``[in, r]``: an engine's flat pieces of it are rows of the tall factor.

Ranks then communicate only r x r Gram matrices and rows that are cut. Files keep PEFT's form.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

TALL_NAME = "tall"
_OF_DEEPSPEED = ("_z3_optimizer", "_zero_optimizer", "_hp_mapping")
_RAW_KEY = re.compile(rf"(.*\.lora_A(?:\.[^.]+)?)\.{TALL_NAME}")


class TallLinear(nn.Linear):
    """A linear layer without bias that stores its weight transposed, as the parameter ``tall`` ``[in, out]``.

    ``weight`` is a view ``[out, in]`` of ``tall``, for code that reads or writes it in place (PEFT's merging, DoRA,
    casts). Assigning a new tensor to ``weight.data`` has no effect. State dictionaries hold ``weight`` ``[out, in]``,
    except under FSDP1, which needs the parameter's own name.
    """

    tall: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        self.register_parameter("bias", None)
        self.tall = nn.Parameter(transposed(weight.detach()), requires_grad=weight.requires_grad)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        tall = self.tall
        if tall.dim() != 2:
            return tall  # a flat piece: FSDP1 and ZeRO-3 leave it outside the layer's forward
        try:
            return tall.t()
        except RuntimeError:  # FSDP1 has freed its memory, and PEFT still reads the dtype
            return tall

    def forward(self, input: Tensor) -> Tensor:
        # F.linear(input, self.weight) would make autograd save a view, which keeps gathered memory until backward.
        # Engines free and gather the parameter itself.
        return torch.matmul(input, self.tall)

    def _keeps_raw_name(self) -> bool:
        return bool(getattr(self, "_is_fsdp_managed_module", False)) and not isinstance(self.tall.data, DTensor)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._keeps_raw_name():
            destination[f"{prefix}weight"] = transposed(destination.pop(f"{prefix}{TALL_NAME}"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own, files = f"{prefix}{TALL_NAME}", f"{prefix}weight"
        weight = state_dict.pop(files, None)
        if weight is not None:
            state_dict[own] = transposed(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if weight is not None:
            del state_dict[own]
            state_dict[files] = weight


def tall_adapters(model: nn.Module) -> int:
    """Store lora_A of a PEFT model's trainable linear adapters tall, as ``[in, r]``.

    Call it after the adapter is made and initialized, and before the model is wrapped or sharded and the optimizer is
    created, since it replaces parameters. ``RefLoRACallback`` calls it under FSDP and DeepSpeed. Adapters of
    embeddings and convolutions, tied and frozen adapters, and those made under ``zero.Init`` stay as they are.
    Forward, merging and files agree with PEFT's bit for bit, except for the order of sums in the forward.

    Args:
        model: the bare model with PEFT LoRA layers.

    Returns:
        The number of adapters that were converted. Those that are tall already do not count.

    Raises:
        TypeError: the model has no LoRA layer.
        ValueError: the model is wrapped or sharded, or an optimizer holds the parameters that would be replaced.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise TypeError(
            f"{type(model).__name__} has no LoRA layer: call peft.get_peft_model(model, LoraConfig(...)) first"
        )
    _refuse_deepspeeds(layers)
    found = [(layer, adapter, linear) for layer in layers for adapter, linear in _convertible(layer)]
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter.data_ptr() or id(parameter)] = uses.get(parameter.data_ptr() or id(parameter), 0) + 1
    found = [
        (layer, adapter, linear)
        for layer, adapter, linear in found
        if uses.get(linear.weight.data_ptr() or id(linear.weight)) == 1  # PEFT ties parameters by memory
    ]
    if found:
        _refuse_too_late(model, {id(linear.weight) for _, _, linear in found})
    for layer, adapter, linear in found:
        layer.lora_A[adapter] = TallLinear(linear)
    if found:
        _convert_what_is_saved(model)
    return len(found)


def is_tall(module: nn.Module) -> bool:
    """Return whether a module, bare or in FSDP1's wrapper, stores its weight tall."""
    return isinstance(getattr(module, "_fsdp_wrapped_module", module), TallLinear)


def peft_key(key: str) -> str:
    """Return PEFT's name for a parameter's name. They differ for a factor that is stored tall."""
    match = _RAW_KEY.fullmatch(key)
    return f"{match[1]}.weight" if match else key


def transposed(tensor: Tensor) -> Tensor:
    """Return a contiguous transposed copy of a matrix, and flat pieces as they are."""
    if tensor.dim() != 2:
        return tensor
    # contiguous() would keep the column strides of a single row, which some views do not accept
    return tensor.t().clone(memory_format=torch.contiguous_format)


def in_peft_form(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a state dictionary by parameters' names (ZeRO-3's, FSDP1's) to the names and shapes of PEFT's files."""
    return {peft_key(key): transposed(value) if peft_key(key) != key else value for key, value in state_dict.items()}


def _convertible(layer: LoraLayer) -> Iterator[tuple[str, nn.Linear]]:
    if isinstance(layer, (Embedding, MultiheadAttention)):
        return
    modules: Any = layer.lora_A
    for adapter, module in modules.items():
        # DeepSpeed tracks a parameter made under zero.Init, so it cannot be replaced.
        plain = type(module) is nn.Linear and module.bias is None and not hasattr(module.weight, "ds_id")
        if plain and module.weight.requires_grad:
            yield adapter, module


def _refuse_deepspeeds(layers: Iterable[LoraLayer]) -> None:
    """Refuse adapters for which deepspeed.initialize has made masters. ``zero.Init`` alone makes none."""
    for layer in layers:
        for module in layer.lora_A.values():
            held = [name for name in _OF_DEEPSPEED for p in module.parameters() if hasattr(p, name)]
            if held and not isinstance(module, TallLinear):
                raise ValueError(
                    "tall_adapters() comes too late: deepspeed.initialize holds the adapters' parameters. Call it "
                    "before deepspeed.initialize / accelerator.prepare"
                )


def _refuse_too_late(model: nn.Module, replaced: set[int]) -> None:
    wrappers = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    for module in model.modules():
        if isinstance(module, wrappers) or type(module).__name__ == "DeepSpeedEngine":
            raise ValueError(
                f"tall_adapters() comes too late: the model is wrapped or sharded already ({type(module).__name__}). "
                "Call it after get_peft_model and before fully_shard / FSDP / DDP / deepspeed.initialize / "
                "accelerator.prepare"
            )
    if any(isinstance(parameter.data, DTensor) for parameter in model.parameters() if id(parameter) in replaced):
        raise ValueError("tall_adapters() comes too late: the adapters are sharded already (DTensor). Call it before")
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.optim.Optimizer):
            groups = getattr(candidate, "param_groups", [])
            if any(id(parameter) in replaced for group in groups for parameter in group["params"]):
                raise ValueError(
                    f"tall_adapters() comes too late: {type(candidate).__name__} holds the adapters' parameters, which "
                    "would be replaced. Call it before creating the optimizer"
                )


def _convert_what_is_saved(model: nn.Module) -> None:
    """Make ``save_pretrained`` convert its ``state_dict``: some engines gather by parameters' names, not PEFT's."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            module.save_pretrained = functools.partial(_save_pretrained, module)  # type: ignore[method-assign]


def _save_pretrained(model: PeftModel, *args: Any, state_dict: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    if state_dict is not None:
        kwargs["state_dict"] = in_peft_form(state_dict)
    return type(model).save_pretrained(model, *args, **kwargs)
