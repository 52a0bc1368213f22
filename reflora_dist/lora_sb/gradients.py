"""Gradients of frozen weights under any engine: ``dY^T X`` of each layer, row block by row block, summed over ranks.

The weight itself takes no part: it stays frozen, and how the engine shards it does not matter. What an engine has to
do is run the model forward and back.
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
# Input and output gradient of every call of a layer in one batch, [tokens, in] and [tokens, out].
_Calls = list[tuple[Tensor, Tensor]]


def mean_gradients(
    model: nn.Module, layers: Sequence[Any], batches: Sequence[Any], loss: Loss, comm: Communicator
) -> list[Tensor]:
    """The mean gradient of linear layers' weights over all ranks' batches: of each this rank's block of rows.

    Every batch counts the same, as under data parallelism; a layer that none of them reaches has the gradient zero.

    All parameters are frozen meanwhile, so that engines have no gradient to reduce or to accumulate. The graph begins
    at the given layers: what lies before them only runs forward. Random states are what they were afterwards.

    Shapes:
        returned  [rows_k, in]  float32, per layer; the rows of :func:`row_block`

    Args:
        model: as the engine returned it, or bare.
        layers: modules that take ``[..., in]`` and return ``[..., out]``, with ``in_features`` and ``out_features``.
        batches: as many on every rank.
        loss: from the model and a batch, its mean loss.
        comm: all ranks that hold batches.

    Communication: per batch and layer one reduce per rank, in all ``out * in`` float32 values; and the engine's own.
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
                # after backward and in one order: a layer that one rank does not reach makes no rank wait for ever
                _add_products(total, calls.pop(0), layer, comm)
    for total in totals:
        total /= len(batches) * comm.world_size
    return totals


def row_block(rows: int, rank: int, world_size: int) -> slice:
    """The rows that a rank owns: equal blocks but for one row, in the order of ranks; some may be empty."""
    return slice(rank * rows // world_size, (rank + 1) * rows // world_size)


def _calls_of(module: nn.Module, layers: Sequence[nn.Module], batch: Any, loss: Loss) -> list[_Calls]:
    """Run one batch forward and back."""
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
    """What FSDP1 does after backward, but under NO_SHARD leaves out for a unit in which nothing needs a gradient.

    Its modules would keep views instead of parameters, and lose these for good in the next forward.
    """
    units = (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))
    for handle in (unit._handle for unit in units if unit._use_orig_params):
        if handle is not None and not handle.uses_sharded_strategy:
            handle._use_sharded_views()


def _recorder(calls: _Calls) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None  # the first forward of reentrant checkpointing; it comes again
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        x = inputs[0].detach()
        output.register_hook(lambda gradient: calls.append((x.flatten(0, -2), gradient.flatten(0, -2))))
        return output

    return record


def _add_products(total: Tensor, calls: _Calls, layer: Any, comm: Communicator) -> None:
    """Add this batch's ``dY^T X`` to the owner's rows. No rank ever holds more of it than one block."""
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
    """What to run: DDP and DeepSpeed would prepare the reduction of gradients, of which there are none.

    ZeRO-3 gathers weights by hooks on the modules inside, FSDP by the wrapper.
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
