"""Gradients of frozen weights under any engine: ``dY^T X`` of each layer, summed over ranks.

They are computed one block of rows at a time. The weight itself stays frozen, and its sharding does not matter: the
engine only has to run the model forward and backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from ..collectives.communicator import Communicator

Loss = Callable[[Any, Any], Tensor]
# Per call of a layer in one batch: its input [tokens, in] and its output's gradient [tokens, out].
_Calls = list[tuple[Tensor, Tensor]]


def mean_gradients(
    model: nn.Module, layers: Sequence[Any], batches: Sequence[Any], loss: Loss, comm: Communicator
) -> list[Tensor]:
    """Return this rank's rows of the mean gradient of each layer's weight, over all ranks' batches.

    Every batch has the same weight in the mean, as under data parallelism. A layer that no batch reaches has a zero
    gradient.

    During the call all parameters are frozen, so that engines have no gradient to reduce or accumulate. The autograd
    graph begins at the given layers; modules before them run forward only. Random states are restored afterwards.

    Shapes:
        returned  [rows_k, in]  float32, per layer; the rows of :func:`row_block`

    Args:
        model: the model that the engine returned, or the bare model.
        layers: modules that take ``[..., in]`` and return ``[..., out]``, with ``in_features`` and ``out_features``.
        batches: this rank's batches; the number must be the same on every rank.
        loss: takes the model and a batch, and returns the batch's mean loss.
        comm: all ranks that hold batches.

    Communication: per batch and layer one reduce to each rank, together ``out * in`` float32 values, and the engine's
    own in forward and backward.
    """
    module = _callable(model)
    device = comm.device
    blocks = [row_block(layer.out_features, comm.rank, comm.world_size) for layer in layers]
    totals = [
        torch.zeros(block.stop - block.start, layer.in_features, device=device)
        for layer, block in zip(layers, blocks, strict=True)
    ]
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _frozen(model):
        for batch in batches:
            calls = _calls_of(module, layers, batch, loss)
            for layer, total in zip(layers, totals, strict=True):
                # after backward and in a fixed order: ranks need not reach the same layers for the reduces to match
                _add_products(total, calls.pop(0), layer, comm)
    for total in totals:
        total /= len(batches) * comm.world_size
    return totals


def row_block(rows: int, rank: int, world_size: int) -> slice:
    """Return the rows that a rank owns. Ranks own consecutive blocks that differ by at most one row, perhaps empty."""
    return slice(rank * rows // world_size, (rank + 1) * rows // world_size)


def _calls_of(module: nn.Module, layers: Sequence[nn.Module], batch: Any, loss: Loss) -> list[_Calls]:
    """Run one batch forward and backward, and return the recorded calls of each layer."""
    calls: list[_Calls] = [[] for _ in layers]
    hooks = [layer.register_forward_hook(_recorder(calls[index])) for index, layer in enumerate(layers)]
    try:
        with torch.enable_grad():
            value = loss(module, batch)
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the loss of a batch is {value!r}: give batches with labels, or loss=... that computes it"
                )
            if value.requires_grad:  # if not, this batch reaches none of the layers
                value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    _restore_unsharded_units(module)
    return calls


def _restore_unsharded_units(model: nn.Module) -> None:
    """Put the parameters of FSDP1's NO_SHARD units back into their modules.

    FSDP1 does this after backward, but skips NO_SHARD units in which nothing needs a gradient. The modules of such a
    unit would keep views in place of parameters, and the next forward would lose the parameters for good.
    """
    units = (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))
    for handle in (unit._handle for unit in units if unit._use_orig_params):
        if handle is not None and not handle.uses_sharded_strategy:
            handle._use_sharded_views()


def _recorder(calls: _Calls) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None  # first forward of reentrant checkpointing; the recomputation is recorded
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        x = inputs[0].detach()
        output.register_hook(lambda gradient: calls.append((x.flatten(0, -2), gradient.flatten(0, -2))))
        return output

    return record


def _add_products(total: Tensor, calls: _Calls, layer: Any, comm: Communicator) -> None:
    """Add this batch's ``dY^T X`` to ``total`` on each owner of rows. A rank never holds more than one block of it."""
    wide = [(x.to(total.device, torch.float32), gradient) for x, gradient in calls]
    for owner in range(comm.world_size):
        rows = row_block(layer.out_features, owner, comm.world_size)
        if rows.start == rows.stop:
            continue
        part = total.new_zeros(rows.stop - rows.start, layer.in_features)
        for x, gradient in wide:
            part.addmm_(gradient[:, rows].to(total.device, torch.float32).T, x)
        comm.reduce_to(owner, part)
        if owner == comm.rank:
            total += part


def _callable(model: nn.Module) -> Any:
    """Return the module to run: without the wrappers of DDP and DeepSpeed, which would prepare a gradient reduction.

    FSDP's wrapper stays, because it gathers the weights; ZeRO-3 gathers them by hooks on the inner modules.
    """
    if isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        return model.module
    return model


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
