"""Before training starts all ranks tell each other what they found, so that an error is an error everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from . import kernels
from .config import RefLoRAConfig
from .engines import Engine
from .tiling import LocalShard, follow_each_other


@dataclasses.dataclass(frozen=True)
class _Finding:
    error: str | None
    config: str
    engine: str = ""
    pairs: tuple[tuple[str, int], ...] = ()
    optimizer: str = ""
    shards: tuple[LocalShard, ...] = ()
    checksum: int = 0
    has_moments: bool = False
    state: str = ""
    kernels: bool = False


def agree(
    engine: Engine | None, config: RefLoRAConfig, state: str, error: Exception | None
) -> tuple[list[list[LocalShard]], bool]:
    """Compare the ranks' findings.

    Args:
        engine: what this rank found, or None if it met ``error``.
        config: of this rank.
        state: of the handle to continue, as text; empty for a new run.
        error: to be raised, here as it is and elsewhere with this rank's number.

    Returns:
        The shards of every rank of ``engine.group``, and whether any rank's optimizer holds moments of earlier
        steps (a resumed run).

    Raises:
        ValueError: ranks disagree on the configuration, the engine or the adapters, or replicas differ.

    Communication: one all-gather of objects over all ranks.
    """
    try:
        own = _finding(engine, config, state, error)
    except Exception as caught:  # whatever it is: the other ranks wait for this one's finding
        error = caught
        own = _finding(None, config, state, error)
    findings: list[Any] = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        findings = [None] * dist.get_world_size()
        dist.all_gather_object(findings, own)
    if error is not None:
        raise error
    for rank, finding in enumerate(findings):
        if finding.error is not None:
            raise ValueError(f"attach failed on rank {rank}: {finding.error}")
    for field in ("config", "engine", "pairs", "optimizer", "state"):
        _require_equal(field, findings)
    assert engine is not None
    group = _ranks(engine.group) or [dist.get_rank() if len(findings) > 1 else 0]
    _compare_replicas(engine, findings)
    if kernels.usable(_kernel_device(engine)) and not all(finding.kernels for finding in findings):
        kernels.disable()
    shards = follow_each_other([findings[rank].shards for rank in group])
    return shards, any(finding.has_moments for finding in findings)


def _finding(engine: Engine | None, config: RefLoRAConfig, state: str, error: Exception | None) -> _Finding:
    if engine is None:
        return _Finding(f"{type(error).__name__}: {error}", repr(config))
    return _Finding(
        error=None,
        config=repr(config),
        engine=f"{engine.name}, {engine.layout}",
        pairs=tuple((pair.name, pair.lora_rank) for pair in engine.pairs),
        optimizer=type(engine.optimizer).__name__,
        shards=tuple(engine.shards()),
        checksum=_checksum(engine) if engine.replicas is not None else 0,
        has_moments=any(bool(moments["exp_avg_sq"].any()) for moments in engine.moments() if "exp_avg_sq" in moments),
        state=state,
        kernels=kernels.work([pair.lora_rank for pair in engine.pairs], _kernel_device(engine)),
    )


def _kernel_device(engine: Engine) -> torch.device:
    """Where products are formed: where the shards lie, or the accelerator if an offloaded optimizer holds them."""
    device = engine.weights()[0].device
    offloaded = device.type == "cpu" and engine.group is not None and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if offloaded else device


def _require_equal(field: str, findings: list[_Finding]) -> None:
    first = getattr(findings[0], field)
    for rank, finding in enumerate(findings):
        other = getattr(finding, field)
        if other != first:
            raise ValueError(f"ranks disagree on the {field}: rank 0 has {first}, rank {rank} has {other}")


def _compare_replicas(engine: Engine, findings: list[_Finding]) -> None:
    ranks = _ranks(engine.replicas)
    checksums = {findings[rank].checksum for rank in ranks}
    if len(checksums) > 1:
        raise ValueError(
            f"ranks {ranks} should hold the same factors but do not: each rank would form its own S. Seed all ranks "
            "alike or wrap the model (DDP broadcasts) before attach()"
        )


def _checksum(engine: Engine) -> int:
    """Sum of the weights' bit patterns: equal bits give equal sums, in any order."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [weight.contiguous().view(integers[weight.element_size()]).sum() for weight in engine.weights()]
    return sum(position * int(value) for position, value in enumerate(torch.stack(sums).tolist(), start=1))


def _ranks(group: dist.ProcessGroup | None) -> list[int]:
    return dist.get_process_group_ranks(group) if group is not None else []
