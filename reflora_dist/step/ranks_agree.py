"""The comparison of all ranks' findings before training: an error on one rank is raised on every rank.

Ranks exchange a digest of each finding, so the message has a fixed size for any model and number of adapters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..algebra import kernel_check, kernels
from ..collectives.communicator import communication_device
from ..engines.base import Engine
from ..methods.config import RefLoRAConfig

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class _Finding:
    """The findings of one rank. The texts must be the same on all ranks."""

    texts: dict[str, str]
    error: str = ""
    checksum: int = 0
    has_moments: bool = False
    kernels: bool = False

    def packed(self) -> list[int]:
        """Return the finding as numbers that fit into int64."""
        digests = [_digest(self.texts.get(name, "")) for name in _COMPARED]
        return [bool(self.error), self.has_moments, self.kernels, _signed(self.checksum), *digests]


_COMPARED = ("config", "engine", "pairs", "layout", "optimizer", "state")
_ERROR, _MOMENTS, _KERNELS, _CHECKSUM, _FIRST_DIGEST = range(5)
_LONGEST = 2000  # characters of a text in an error message


def compare_ranks(engine: Engine | None, config: RefLoRAConfig, state: str, error: Exception | None) -> bool:
    """Compare the findings of all ranks. Every rank must call.

    Args:
        engine: the engine that this rank found, or None if it met ``error``.
        config: this rank's configuration.
        state: the state of the handle to continue, as text; empty for a new run.
        error: this rank's error, or None. It is raised here as it is, on other ranks with this rank's number.

    Returns:
        Whether any rank's optimizer holds moments of earlier steps (a resumed run).

    Raises:
        ValueError: ranks disagree on the configuration, the engine, the adapters, the layout, the optimizer or the
            state; replicas differ; or another rank met an error.

    Communication: one all-gather of ten int64 numbers over all ranks; if they disagree, two broadcasts of a text.
    """
    try:
        own = _finding(engine, config, state, error)
    except Exception as caught:  # any error, since the other ranks wait for this rank's finding
        error = caught
        own = _finding(None, config, state, error)
    found = _all_gather(own.packed())
    if failed := (found[:, _ERROR] > 0).nonzero().flatten().tolist():
        message = _from_rank(failed[0], own.error)
        raise error if error is not None else ValueError(f"attach failed on rank {failed[0]}: {message}")
    for field, digests in zip(_COMPARED, found.T[_FIRST_DIGEST:], strict=True):
        if others := (digests != digests[0]).nonzero().flatten().tolist():
            first, other = (_from_rank(rank, own.texts[field][:_LONGEST]) for rank in (0, others[0]))
            raise ValueError(f"ranks disagree on the {field}: rank 0 has {first}, rank {others[0]} has {other}")
    assert engine is not None
    _compare_replicas(engine, found[:, _CHECKSUM])
    if kernels.usable(_kernel_device(engine)) and not bool(found[:, _KERNELS].all()):
        kernels.disable()
    return bool(found[:, _MOMENTS].any())


def differ_between_replicas(engine: Engine, tensors: Sequence[Tensor | None]) -> bool:
    """Return whether any replica's tensors differ, bit for bit, from the others'. Waits for the device.

    Communication: one all-reduce of two int64 numbers over the replicas; every rank must call.
    """
    if engine.replicas is None or dist.get_world_size(engine.replicas) == 1:
        return False
    value = _signed(_checksum([tensor for tensor in tensors if tensor is not None]))
    device = communication_device(engine.replicas, torch.device("cpu"))
    extremes = torch.tensor([value, -value], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=engine.replicas)
    largest, smallest_negated = extremes.tolist()
    return largest != -smallest_negated


def _finding(engine: Engine | None, config: RefLoRAConfig, state: str, error: Exception | None) -> _Finding:
    if engine is None:
        return _Finding({"config": repr(config)}, f"{type(error).__name__}: {error}"[:_LONGEST])
    return _Finding(
        texts={
            "config": repr(config),
            "engine": f"{engine.name}, {engine.layout}",
            "pairs": repr(tuple((pair.name, pair.lora_rank) for pair in engine.pairs)),
            "layout": repr([tuple(layout) for layout in engine.layouts()]),
            "optimizer": type(engine.optimizer).__name__,
            "state": state,
        },
        checksum=_checksum(engine.weights()) if engine.replicas is not None else 0,
        has_moments=any(bool(moments["exp_avg_sq"].any()) for moments in engine.moments() if "exp_avg_sq" in moments),
        kernels=kernel_check.kernels_work([pair.lora_rank for pair in engine.pairs], _kernel_device(engine)),
    )


def _all_gather(numbers: list[int]) -> Tensor:
    """Return the numbers of all ranks, ``[ranks, len(numbers)]`` int64, on the host."""
    own = torch.tensor(numbers, dtype=torch.int64)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own[None]
    own = own.to(communication_device(dist.group.WORLD, own.device))
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.stack(found).cpu()


def _from_rank(rank: int, text: str) -> str:
    """Return one rank's text on all ranks. Communication: one broadcast."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return text
    holder = [text]
    dist.broadcast_object_list(holder, src=rank)
    return holder[0]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)


def _signed(value: int) -> int:
    """Reduce an integer of any size to one in [0, 2^63 - 1), so that it and its negative fit into int64."""
    return value % (2**63 - 1)


def _kernel_device(engine: Engine) -> torch.device:
    """The device that forms products: the shards' own, or the accelerator for shards that an optimizer offloads."""
    device = engine.weights()[0].device
    offloaded = device.type == "cpu" and engine.group is not None and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if offloaded else device


def _compare_replicas(engine: Engine, checksums: Tensor) -> None:
    ranks = dist.get_process_group_ranks(engine.replicas) if engine.replicas is not None else []
    if len({int(checksums[rank]) for rank in ranks}) > 1:
        raise ValueError(
            f"ranks {_shown(ranks)} should hold the same factors but do not: each rank would form its own S. Seed all "
            "ranks alike or wrap the model (DDP broadcasts) before attach()"
        )


def _shown(ranks: Sequence[int]) -> str:
    return str(ranks) if len(ranks) <= 16 else f"{ranks[0]} to {ranks[-1]}"


def _checksum(tensors: Sequence[Tensor]) -> int:
    """Sum the tensors' bit patterns as integers: equal bits give equal sums, in any order of summation."""
    sums = [tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum() for tensor in tensors]
    values = torch.stack(sums).tolist() if sums else []
    return sum(position * int(value) for position, value in enumerate(values, start=1))
