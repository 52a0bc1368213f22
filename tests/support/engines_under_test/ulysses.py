"""DeepSpeed's Ulysses: two ranks hold the halves of each sequence, and exchange heads for positions in attention."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.engines_under_test.common import Engine, Wrapped, cut_sequences, rank, summed_loss, world_size
from tests.support.engines_under_test.zero import Zero, _zero
from tests.support.workloads import Settings

SEQUENCE_RANKS = 2
_ATTENTION = "sdpa"
_core: list[Any] = []  # transformers' attention, which DeepSpeed replaces in its table


class _Ulysses(Zero):
    """Ranks of one sequence see the same rows, and each has its half of them."""

    def local(self, batch: Tensor) -> Tensor:
        return batch.chunk(world_size() // SEQUENCE_RANKS)[rank() // SEQUENCE_RANKS]

    def loss(self, rows: Tensor) -> Tensor:
        part = cut_sequences(rows, SEQUENCE_RANKS)[rank() % SEQUENCE_RANKS]
        own = summed_loss(self.model, *part)
        total = all_reduce(own, group=parallel_state_sp.get_sequence_parallel_group())
        return total / (rows.shape[0] * (rows.shape[1] - 1))


def _ulysses(model: nn.Module, settings: Settings, micro_batch_size: int, *, stage: int) -> Wrapped:
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    if _core:
        ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _core[0]
        parallel_state_sp._release_sequence_parallel_groups()
    else:
        _core.append(ALL_ATTENTION_FUNCTIONS[_ATTENTION])
    model.config._attn_implementation = _ATTENTION  # type: ignore[union-attr]
    micro_batch_size *= SEQUENCE_RANKS
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=_ATTENTION,
        sequence_parallel_size=SEQUENCE_RANKS,
        micro_batch_size=micro_batch_size,
        seq_length_is_variable=True,
    )
    more = {"sequence_parallel_size": SEQUENCE_RANKS}
    wrapped = _zero(model, settings, micro_batch_size, stage=stage, more=more, mpu=mpu)
    assert dist.get_world_size(parallel_state_sp.get_sequence_parallel_group()) == SEQUENCE_RANKS
    return _Ulysses(wrapped.model, wrapped.optimizer, settings, bare=wrapped.bare)


ENGINES = [
    # sdpa, where the reference has eager attention, and sums of two halves: measured 2e-4, for plain LoRA too
    Engine(
        f"zero{stage}-ulysses",
        functools.partial(_ulysses, stage=stage),
        world_sizes=(2, 4),
        bf16_factor_tolerance=1e-3,
    )
    for stage in (2, 3)
]
