"""Context parallelism under FSDP2, as accelerate prepares it: two ranks hold the halves of each sequence.

torch's ring attention has no CPU kernel. On a CPU each rank gathers keys and values for its half of the queries
instead, which is the same attention. All else is accelerate's: the mesh, the shards over data and sequences together,
the sums of gradients.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import Shard
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.engines_under_test.accelerated import FSDP_PLUGIN, Accelerated, forget_accelerate, fsdp_on_cpu
from tests.support.engines_under_test.common import (
    DEVICE,
    Engine,
    Wrapped,
    cut_sequences,
    optimizer_of,
    rank,
    summed_loss,
    world_size,
)
from tests.support.engines_under_test.fsdp import assert_fsdp2_shards
from tests.support.workloads import Settings, named_factors

SEQUENCE_RANKS = 2
_GATHERED = "gathered_keys"
_group: list[Any] = []  # of the ranks of this rank's sequences


class _ContextParallel(Accelerated):
    """Ranks of one sequence see the same rows, and each has a half of them."""

    _context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def local(self, batch: Tensor) -> Tensor:
        return batch.chunk(world_size() // SEQUENCE_RANKS)[rank() // SEQUENCE_RANKS]

    def loss(self, rows: Tensor) -> Tensor:
        if DEVICE.type == "cpu":
            tokens, places, wanted = cut_sequences(rows, SEQUENCE_RANKS)[rank() % SEQUENCE_RANKS]
        else:
            ((tokens, places, wanted),) = cut_sequences(rows.clone(), 1)
            cut = [tokens, places, wanted]
            self._context = self.accelerator.maybe_context_parallel(cut, [1, 1, 1], set(cut))
            self._context.__enter__()
        own = summed_loss(self.model, tokens, places, wanted)
        # FSDP takes the mean over all ranks, and the ranks of a sequence have a part of its tokens each
        return own * SEQUENCE_RANKS / (rows.shape[0] * (rows.shape[1] - 1))

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._context.__exit__(None, None, None)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """Attend from this rank's half of the queries to all keys, ``[batch, heads, seq, dim]``."""
    first = dist.get_rank(_group[0]) * query.shape[2]
    after = (SEQUENCE_RANKS - 1) * query.shape[2] - first
    # a gather that gradients pass back through: the backward of torch's all_gather gives wrong ones over gloo
    keys, values = (all_reduce(nn.functional.pad(x, (0, 0, first, after)), group=_group[0]) for x in (key, value))
    places = torch.arange(first, first + query.shape[2]).unsqueeze(1)
    causal = torch.arange(keys.shape[2]).unsqueeze(0) <= places
    attended = nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=causal, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def _context_parallel(model: nn.Module, settings: Settings, micro_batch_size: int) -> Wrapped:
    forget_accelerate()
    with fsdp_on_cpu():
        accelerator = Accelerator(
            cpu=DEVICE.type == "cpu",
            fsdp_plugin=FullyShardedDataParallelPlugin(**FSDP_PLUGIN[2]),
            parallelism_config=ParallelismConfig(dp_shard_size=world_size() // SEQUENCE_RANKS, cp_size=SEQUENCE_RANKS),
            gradient_accumulation_steps=settings.grad_accum,
        )
    ALL_ATTENTION_FUNCTIONS[_GATHERED] = _attention
    model.config._attn_implementation = _GATHERED if DEVICE.type == "cpu" else "sdpa"  # type: ignore[union-attr]
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model, settings))
    _group[:] = [accelerator.torch_device_mesh["cp"].get_group()]
    assert dist.get_world_size(_group[0]) == SEQUENCE_RANKS
    assert_fsdp2_shards(prepared)
    for factor in named_factors(prepared).values():
        assert factor.placements == (Shard(0),) and factor.device_mesh.shape == (world_size(),)
    return _ContextParallel(accelerator, prepared, optimizer, settings)


ENGINES = [Engine("fsdp2-context-parallel", _context_parallel, world_sizes=(2, 4))]
