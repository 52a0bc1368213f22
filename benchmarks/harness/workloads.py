"""The timed workloads: a whole training step, or the optimizer step of adapters without their model."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from benchmarks.harness.engines import Trainee, fused_adamw, placement_fn, stores_tall, wrap
from benchmarks.harness.models import LINEARS, ModelShape, build_model
from benchmarks.harness.names import STEP_ENGINES
from reflora_dist import tall_adapters
from reflora_dist.engines.pairs import find_pairs

_BATCHES = 4  # number of different batches, made in advance


class Workload(Protocol):
    """A step in two parts, so that the second part can be timed alone."""

    trainee: Trainee

    def prepare(self) -> None:
        """Do everything before the optimizer step."""
        ...

    def step(self) -> None:
        """Run the optimizer step."""
        ...


class OptimizerStep:
    """Real adapters on a base without memory, with the same random gradients before every step.

    So the adapters of a 70B model fit on a device that is too small for its weights.

    Args:
        shape: the model's shape.
        lora_rank: r.
        device: the factors' device.
        engine: one of STEP_ENGINES. Under "fsdp2" factors are sharded by rows, with lora_A stored tall; with "-flat"
            it is stored as PEFT does, and under "fsdp2-shard1" sharded by columns.
    """

    def __init__(self, shape: ModelShape, lora_rank: int, device: torch.device, engine: str) -> None:
        assert engine in STEP_ENGINES
        model = adapters_alone(shape, lora_rank, device)
        if stores_tall(engine):
            tall_adapters(model)
        if engine.startswith("fsdp2"):
            assert dist.group.WORLD is not None
            mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
            frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
            placement = placement_fn(engine, model)
            fully_shard(model, mesh=mesh, ignored_params=frozen, shard_placement_fn=placement)
        optimizer = fused_adamw(model, 1e-7)  # gradients do not depend on the weights, so weights must not drift
        # looked up at every call, because a variant may replace the step
        self.trainee = Trainee(model, optimizer, lambda loss: None, lambda: optimizer.step())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        self._gradients = [_local(parameter.grad) for parameter in trained if parameter.grad is not None]
        self._values = [torch.randn_like(gradient) for gradient in self._gradients]

    def prepare(self) -> None:
        torch._foreach_copy_(self._gradients, self._values)  # the last step may have changed them in place

    def step(self) -> None:
        self.trainee.step()


def adapters_alone(shape: ModelShape, lora_rank: int, device: torch.device) -> torch.nn.Module:
    """Return a PEFT model with adapters on all seven linears, and a base without memory."""
    model = meta_adapters(shape, lora_rank)
    torch.manual_seed(0)
    for pair in find_pairs(model):
        for module in pair.factor_modules():
            module.to_empty(device=device)
        torch.nn.init.kaiming_uniform_(pair.lora_a, a=5**0.5)
        torch.nn.init.normal_(pair.lora_b, std=0.02)  # pairs with PEFT's B = 0 would be skipped
    return model


def meta_adapters(shape: ModelShape, lora_rank: int) -> torch.nn.Module:
    """Return a PEFT model with adapters on all seven linears, all on the meta device."""
    with torch.device("meta"):
        base = LlamaForCausalLM(shape.config())
    config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LINEARS)
    return get_peft_model(base, config, low_cpu_mem_usage=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class TrainingStep:
    """Forward, backward and optimizer step of a model built from its configuration, on random tokens.

    The base is bfloat16 on a GPU and float32 on a CPU. On a GPU the forward runs under autocast, unless DeepSpeed casts
    the model itself. The updated factors are float32.

    Args:
        engine: one of ``names.ENGINES``.
        shape: the model's shape.
        lora_rank: r.
        device: this rank's device.
        micro_batch_size: sequences per rank and backward.
        seq_len: tokens of a sequence.
        accumulation_steps: backward passes per optimizer step; 1 under DeepSpeed.
        gradient_checkpointing: whether the backward pass recomputes activations.
        changes: changes of the model's configuration.
    """

    def __init__(
        self,
        engine: str,
        shape: ModelShape,
        lora_rank: int,
        device: torch.device,
        *,
        micro_batch_size: int,
        seq_len: int,
        accumulation_steps: int = 1,
        gradient_checkpointing: bool = False,
        **changes: Any,
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = build_model(shape, lora_rank, device, dtype=dtype, **changes)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.trainee = wrap(engine, model, micro_batch_size=micro_batch_size)
        self._autocast = dtype == torch.bfloat16 and not engine.startswith("zero")
        self._device = device
        self._accumulation_steps = accumulation_steps
        generator = torch.Generator().manual_seed(dist.get_rank())
        size = (_BATCHES, micro_batch_size, seq_len)
        self._batches = torch.randint(shape.vocab_size, size, generator=generator).to(device)
        self.rewind()

    def rewind(self) -> None:
        """Start again with the first batch."""
        self._next = itertools.cycle(self._batches)

    def prepare(self) -> None:
        """Run forward and backward of all micro-batches. ``last_loss`` keeps the loss of the last one."""
        for _ in range(self._accumulation_steps):
            batch = next(self._next)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                loss = self.trainee.model(input_ids=batch, labels=batch).loss
            self.trainee.backward(loss / self._accumulation_steps)
            self.last_loss = loss.detach()

    def step(self) -> None:
        self.trainee.step()
