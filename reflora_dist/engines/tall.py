"""lora_A stored tall, ``[in, r]``: then an engine's flat pieces of it are whole rows of the tall factor.

Only r x r Grams, and rows that an engine cuts in two, have to cross the wire then. Files keep PEFT's form.
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
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

TALL_NAME = "tall"
_OF_DEEPSPEED = ("_z3_optimizer", "_zero_optimizer", "_hp_mapping")
_RAW_KEY = re.compile(rf"(.*\.lora_A(?:\.[^.]+)?)\.{TALL_NAME}")


class TallLinear(nn.Linear):
    """A linear layer without bias that stores its weight transposed, as the parameter ``tall`` ``[in, out]``.

    ``weight`` is a view ``[out, in]`` of it for whoever reads or initializes it in place (PEFT's merging, DoRA, casts);
    a new tensor that is put into ``weight.data`` is lost. State dictionaries hold ``weight`` ``[out, in]``, except
    under FSDP1, which insists on the parameter's own name.
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
            return tall  # a flat piece, as FSDP1 and ZeRO-3 leave it outside of the layer's forward
        try:
            return tall.t()
        except RuntimeError:  # FSDP1 has freed its memory; PEFT asks for the dtype all the same
            return tall

    def forward(self, input: Tensor) -> Tensor:
        # not F.linear(input, self.weight): autograd saves what it is given. The parameter itself is freed and gathered
        # anew by engines; a view of it would keep gathered memory until backward.
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
    """Store lora_A of a PEFT model's trainable linear adapters tall, ``[in, r]``. Returns how many were converted.

    Call it after the adapter and its start are made, before the model is wrapped or sharded and before the optimizer
    is created: parameters are replaced. ``RefLoRACallback`` does so by itself under FSDP and DeepSpeed. Adapters of
    embeddings and convolutions, tied and frozen ones, and those made under ``zero.Init`` stay as they are; so does what
    is converted already. Forward, merging and files are PEFT's, bit for bit but for the order of sums in the forward.

    Args:
        model: with PEFT LoRA layers; not wrapped yet.

    Raises:
        TypeError: there is no LoRA layer.
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
        if uses.get(linear.weight.data_ptr() or id(linear.weight)) == 1  # PEFT ties two parameters by their memory
    ]
    if found:
        _refuse_too_late(model, {id(linear.weight) for _, _, linear in found})
    for layer, adapter, linear in found:
        layer.lora_A[adapter] = TallLinear(linear)
    if found:
        _convert_what_is_saved(model)
    return len(found)


def is_tall(module: nn.Module) -> bool:
    """Whether a module, perhaps inside of FSDP1's wrapper, stores its weight tall."""
    return isinstance(getattr(module, "_fsdp_wrapped_module", module), TallLinear)


def peft_key(key: str) -> str:
    """PEFT's name of a factor for its parameter's: they differ where it is stored tall."""
    match = _RAW_KEY.fullmatch(key)
    return f"{match[1]}.weight" if match else key


def transposed(tensor: Tensor) -> Tensor:
    """``[r, in]`` of ``[in, r]`` and the reverse, in memory of its own; flat pieces as they are."""
    if tensor.dim() != 2:
        return tensor
    # contiguous() would leave a single row as it is, with strides of a column that not every view takes
    return tensor.t().clone(memory_format=torch.contiguous_format)


def in_peft_form(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary by parameters' names (ZeRO-3's and FSDP1's own) with the names and shapes of PEFT's files."""
    return {peft_key(key): transposed(value) if peft_key(key) != key else value for key, value in state_dict.items()}


def _convertible(layer: LoraLayer) -> Iterator[tuple[str, nn.Linear]]:
    if isinstance(layer, (Embedding, MultiheadAttention, ParamWrapper)):
        return
    modules: Any = layer.lora_A
    for adapter, module in modules.items():
        # under zero.Init DeepSpeed knows the parameter itself
        plain = type(module) is nn.Linear and module.bias is None and not hasattr(module.weight, "ds_id")
        if plain and module.weight.requires_grad:
            yield adapter, module


def _refuse_deepspeeds(layers: Iterable[LoraLayer]) -> None:
    """Parameters of which deepspeed.initialize has made masters; what ``zero.Init`` alone has met is fine."""
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
    """Engines that gather by parameters' names hand these to ``save_pretrained``, which looks for PEFT's."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            module.save_pretrained = functools.partial(_save_pretrained, module)  # type: ignore[method-assign]


def _save_pretrained(model: PeftModel, *args: Any, state_dict: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    if state_dict is not None:
        kwargs["state_dict"] = in_peft_form(state_dict)
    return type(model).save_pretrained(model, *args, **kwargs)
