"""The collectives of a step: few, named, counted. All of them go through one Communicator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Counts = dict[int, int]
"""How many elements go to a rank of the group, or come from it: ascending, without zeros."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


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
        self.device = communication_device(group, shard_device) if self.world_size > 1 else shard_device
        self.calls: dict[str, int] = {}
        self.bytes = 0

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

    def all_gather(self, tensor: Tensor) -> Tensor:
        """``[N, *shape]``: every rank's tensor, all of one shape. Counts N - 1 times its own, what a ring sends."""
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        _all_gather(gathered.view(-1), tensor.reshape(-1), group=self.group)
        self._count("all_gather", (self.world_size - 1) * tensor.numel() * tensor.element_size())
        return gathered

    def all_to_all(self, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        """Exchange parts of a 1-D tensor, in the order of ranks; counts the bytes that go to other ranks."""
        received = send.new_empty(sum(receive_counts.values()))
        ranks = range(self.world_size)
        sizes_in, sizes_out = ([counts.get(rank, 0) for rank in ranks] for counts in (receive_counts, send_counts))
        dist.all_to_all_single(received, send, sizes_in, sizes_out, group=self.group)
        self._count("all_to_all", (send.numel() - send_counts.get(self.rank, 0)) * send.element_size())
        return received

    def between_neighbours(self, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        """The same where few ranks are named: point to point, and nothing on a rank that names no other."""
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
    """Where a group's collectives want their tensors, if those to be sent lie on ``shard_device``."""
    # "cpu:gloo,cuda:nccl" -> {"cpu": "gloo", "cuda": "nccl"}
    backends = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(","))
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or backends.get(accelerator.type) in (None, "gloo"):
        return shard_device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
