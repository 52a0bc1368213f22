"""The collectives of a step. All of them go through one Communicator, which counts calls and bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Counts = dict[int, int]
"""Number of elements to or from each rank of the group, in ascending order of ranks, without zeros."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class Communicator:
    """Collectives over the ranks that together hold one copy of every factor.

    Args:
        group: the process group of these ranks; None if this rank holds every factor whole and nothing is sent.
        shard_device: the device of the factors' shards. An offloaded optimizer's shards lie in host memory, and NCCL
            moves device memory only; products and collectives then use the accelerator.

    Attributes:
        world_size: number of ranks in the group.
        rank: this rank's number in the group.
        device: the device of products and collectives.
        calls: number of calls per collective since :meth:`start_step`.
        bytes: number of bytes that this rank has sent since :meth:`start_step`.
    """

    def __init__(self, group: dist.ProcessGroup | None, shard_device: torch.device) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.shard_device = shard_device
        self.device = communication_device(group, shard_device) if self.world_size > 1 else shard_device
        self.calls: dict[str, int] = {}
        self.bytes = 0

    def start_step(self) -> None:
        """Reset the counts of calls and bytes."""
        self.calls = {}
        self.bytes = 0

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over the group, and return the sums in the tensors' shapes.

        Communication: one all-reduce of the concatenation. It counts as 2 (N - 1) / N times the payload, the bytes
        that each of N ranks sends in a ring all-reduce.
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
        """Sum a tensor over the group, and return the sum; it is valid on ``owner``, a rank of the group, only."""
        if self.world_size > 1:
            dist.reduce(tensor, group=self.group, group_dst=owner)
            self._count("reduce", 0 if self.rank == owner else tensor.numel() * tensor.element_size())
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all N ranks, which have one shape, as ``[N, *shape]``.

        It counts as N - 1 times the tensor's bytes, which each rank sends in a ring all-gather.
        """
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        _all_gather(gathered.view(-1), tensor.reshape(-1), group=self.group)
        self._count("all_gather", (self.world_size - 1) * tensor.numel() * tensor.element_size())
        return gathered

    def all_to_all(self, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        """Exchange parts of a 1-D tensor between all ranks; the bytes to other ranks count.

        Args:
            send: the parts for each rank, in the order of ranks.
            send_counts: number of elements for each rank.
            receive_counts: number of elements from each rank.

        Returns:
            The received parts in the order of ranks, 1-D.
        """
        received = send.new_empty(sum(receive_counts.values()))
        ranks = range(self.world_size)
        sizes_in, sizes_out = ([counts.get(rank, 0) for rank in ranks] for counts in (receive_counts, send_counts))
        dist.all_to_all_single(received, send, sizes_in, sizes_out, group=self.group)
        self._count("all_to_all", (send.numel() - send_counts.get(self.rank, 0)) * send.element_size())
        return received

    def between_neighbours(self, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        """Exchange parts as :meth:`all_to_all` does, point to point; for counts that name few ranks.

        A rank that names no other rank communicates nothing.
        """
        received = send.new_empty(sum(receive_counts.values()))
        sent_to = dict(zip(send_counts, send.split(list(send_counts.values())), strict=True))
        received_from = dict(zip(receive_counts, received.split(list(receive_counts.values())), strict=True))
        if self.rank in sent_to:
            received_from.pop(self.rank).copy_(sent_to.pop(self.rank))
        operations = [
            dist.P2POp(operation, part, group=self.group, group_peer=peer)
            for operation, parts in ((dist.isend, sent_to), (dist.irecv, received_from))
            for peer, part in parts.items()
        ]
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
            self._count("send_recv", sum(part.numel() for part in sent_to.values()) * send.element_size())
        return received

    def _count(self, kind: str, sent_bytes: int) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.bytes += sent_bytes


def communication_device(group: dist.ProcessGroup | None, shard_device: torch.device) -> torch.device:
    """Return the device that a group's collectives need for tensors that lie on ``shard_device``."""
    # "cpu:gloo,cuda:nccl" -> {"cpu": "gloo", "cuda": "nccl"}
    backends = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(","))
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or backends.get(accelerator.type) in (None, "gloo"):
        return shard_device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
