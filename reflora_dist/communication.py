"""The collectives of a step: few, named, counted. All of them go through one Communicator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Communicator:
    """Collectives over the ranks that together hold one copy of every factor.

    Args:
        group: their process group; None if this rank holds every factor whole, in which case nothing is sent.
        shard_device: where the factors' shards lie. With an offloaded optimizer they lie in host memory while
            NCCL moves device memory only; then products and collectives use the accelerator.
    """

    def __init__(self, group: dist.ProcessGroup | None, shard_device: torch.device) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.shard_device = shard_device
        self.device = _communication_device(group, shard_device) if self.world_size > 1 else shard_device
        self.calls: dict[str, int] = {}
        self.bytes = 0

    def twin(self) -> Communicator:
        """The same ranks with a process group of their own, for collectives that run beside others.

        Communication: creates process groups; all ranks of the job must call.
        """
        if self.world_size == 1:
            return Communicator(None, self.shard_device)
        own = dist.get_process_group_ranks(self.group)
        everyone: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        # every rank takes part in making every group, in one order: HSDP has one per shard group
        groups = {
            ranks: dist.new_group(list(ranks), backend=dist.get_backend_config(self.group))
            for ranks in sorted({tuple(ranks) for ranks in everyone})
        }
        twin = Communicator(groups[tuple(own)], self.shard_device)
        assert twin.rank == self.rank
        return twin

    def close(self) -> None:
        """Give the process group back, which nobody else may use."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def start_step(self) -> None:
        """Set the counts of calls and bytes back to zero."""
        self.calls = {}
        self.bytes = 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over the group with one all-reduce of their concatenation.

        Counts 2 (N - 1) / N times the payload, what a ring all-reduce makes each of N ranks send.
        """
        if self.world_size == 1:
            return list(tensors)
        bucket = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(bucket, group=self.group)
        payload = bucket.numel() * bucket.element_size()
        self._count("all_reduce", 2 * (self.world_size - 1) * payload // self.world_size)
        pieces = bucket.split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    def reduce_to(self, owner: int, tensor: Tensor) -> Tensor:
        """Sum a tensor over the group; only ``owner``, a rank of the group, may use what is returned."""
        if self.world_size > 1:
            dist.reduce(tensor, group=self.group, group_dst=owner)
            self._count("reduce", 0 if self.rank == owner else tensor.numel() * tensor.element_size())
        return tensor

    def all_to_all(
        self, send: Tensor, send_counts: list[int], receive_counts: list[int], out: Tensor | None = None
    ) -> Tensor:
        """Exchange slices of a 1-D tensor; counts the bytes that go to other ranks."""
        received = send.new_empty(sum(receive_counts)) if out is None else out
        dist.all_to_all_single(received, send, receive_counts, send_counts, group=self.group)
        self._count("all_to_all", (send.numel() - send_counts[self.rank]) * send.element_size())
        return received

    def _count(self, kind: str, sent_bytes: int) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.bytes += sent_bytes


def _communication_device(group: dist.ProcessGroup | None, shard_device: torch.device) -> torch.device:
    # "cpu:gloo,cuda:nccl" -> {"cpu": "gloo", "cuda": "nccl"}
    backends = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(","))
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or backends.get(accelerator.type) in (None, "gloo"):
        return shard_device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
