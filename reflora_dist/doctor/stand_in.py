"""Replacements of GPUs, other ranks and compiled kernels, for a rehearsal in one process on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import DistributedType
from torch.nn.parallel import DistributedDataParallel

# Kernels that may do nothing, such as the optimizers': the trained values do not matter. DeepSpeed's other kernels
# return tensors, so they cannot be skipped.
_IDLE = ("adam", "adagrad", "lion", "lamb", "muon", "shm_comm", "pin_memory", "utils")


class NeedsDeviceError(RuntimeError):
    """The rehearsal reached an operation that needs a GPU or a compiled kernel."""


class _Kernels:
    """Stands for a compiled extension: its functions do nothing, or raise NeedsDeviceError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, function: str) -> Any:
        if function.startswith("__"):
            raise AttributeError(function)

        def kernel(*args: Any, **kwargs: Any) -> None:
            if not any(part in self._name for part in _IDLE):
                raise NeedsDeviceError(f"DeepSpeed's kernel {self._name}.{function}")

        return kernel


class _NoMonitor:
    """Replaces DeepSpeed's writers to TensorBoard, WandB and the like; it writes nothing."""

    enabled = False

    def __init__(self, config: Any) -> None:
        pass

    def write_events(self, events: Any) -> None:
        pass


def prepare() -> None:
    """Patch the libraries so that they run without GPUs. Call it only in a process for rehearsals."""
    import accelerate.utils.dataclasses as plugins
    import accelerate.utils.launch as launch
    import torch.distributed.fsdp._init_utils as fsdp1
    import transformers.training_args

    # accelerate: use the CPU, and no device index under DDP
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_BYPASS_DEVICE_MAP": "true"}
    in_use = launch.is_port_in_use
    replace(launch, is_port_in_use=lambda port: bool(in_use(port)) and False)  # in_use raises for invalid ports
    replace(launch, _get_mpirun_args=lambda: ("mpirun", "--hostfile", "-n", "--npernode", "--bind-to"))
    replace(plugins, is_cuda_available=lambda: True)  # FSDP1's plugin asks where modules are created
    replace(torch.cuda, current_device=lambda: torch.device("cpu"))
    replace(fsdp1, _check_module_states_for_sync_module_states=lambda states: None)
    replace(transformers.training_args, is_torch_bf16_gpu_available=lambda: True)
    replace(DistributedDataParallel, __init__=_sending_nothing(DistributedDataParallel.__init__))
    replace(torch, compile=lambda model=None, **kwargs: model if model is not None else lambda function: function)
    if importlib.util.find_spec("deepspeed"):
        _prepare_deepspeed()


def _sending_nothing(initialize: Callable[..., None]) -> Callable[..., None]:
    """Return DDP's ``__init__`` with a hook that keeps local gradients: the fake group never returns a result."""

    def kept(state, bucket):  # type: ignore[no-untyped-def]  # torch checks annotations
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def initialized(model: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        initialize(model, *args, **kwargs)
        model.register_comm_hook(None, kept)

    return initialized


def _prepare_deepspeed() -> None:
    import deepspeed.launcher.runner
    import deepspeed.runtime.engine
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu.no_impl import NotImplementedBuilder

    # accelerate would write variables for pdsh to this file
    replace(deepspeed.launcher.runner, DEEPSPEED_ENVIRONMENT_NAME=os.devnull)
    replace(deepspeed.runtime.engine, MonitorMaster=_NoMonitor)
    for builder in (OpBuilder, NotImplementedBuilder):
        replace(builder, load=lambda builder, *args, **kwargs: _Kernels(builder.name))
    replace(get_accelerator(), is_fp16_supported=lambda: True)


def replace(owner: Any, **attributes: Any) -> None:
    """Set attributes of a module, a class or an object."""
    for name, value in attributes.items():
        assert hasattr(owner, name), f"{owner} has no {name}"
        setattr(owner, name, value)


def join(world_size: int, deepspeed: bool) -> None:
    """Become rank 0 of a fake group, set up as libraries find one on GPUs.

    Args:
        world_size: number of ranks of the group; the others do not exist.
        deepspeed: whether DeepSpeed runs in it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in rank.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    if launched is None:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if not deepspeed:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
