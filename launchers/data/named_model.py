"""``--model smollm2`` in a job of several ranks and machines."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from reflora_dist.collectives.ranks import world_size
from reflora_dist.files import smollm2

from ..cluster.waiting import working_first


def resolve_together(name: str, cache_dir: Path | None, local_rank: int) -> str:
    """Return what to load for a model's name, as ``smollm2.resolve_model``; every rank must call.

    One rank of each machine gets the model.

    Raises:
        ValueError: the model cannot be had, or machines have it from different places, with different weights.

    Communication: for smollm2 a meeting of all ranks, and one all-gather of a short text.
    """
    if name != smollm2.NAME:
        return name
    with working_first(local_rank == 0, "getting the model"):
        found = smollm2.resolve_model(name, cache_dir, build=local_rank == 0)
    everywhere = [Path(found).name] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everywhere, Path(found).name)
    if len(set(everywhere)) > 1:
        raise ValueError(
            f"model={name!r} has other weights on some machines ({', '.join(sorted(set(everywhere)))}), because only "
            "some of them reach the hub: set HF_HUB_OFFLINE=1 on all, or give --model a folder"
        )
    return found
