"""Speeds of GPUs and of the links between them, from published measurements and data sheets, with sources.

This project measured none of them. ``derivation`` says how a constant follows from the published figure.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """A cost in seconds per unit (hop, message, byte, operation), the published figure, and its source."""

    seconds: float
    title: str
    url: str
    published: str
    derivation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of GPUs. ``constants`` are costs by the names of the events in ``cost_model``."""

    title: str
    gpus_per_node: int
    memory_bytes: float  # of one GPU
    constants: dict[str, Constant]


def _microseconds(value: float, title: str, url: str, published: str, derivation: str) -> Constant:
    return Constant(seconds=value * 1e-6, title=title, url=url, published=published, derivation=derivation)


def _rate(per_second: float, title: str, url: str, published: str, derivation: str) -> Constant:
    return Constant(seconds=1 / per_second, title=title, url=url, published=published, derivation=derivation)


_ISSUES = "https://github.com/NVIDIA/nccl-tests/issues"
_RING_LATENCY = (
    "Understanding the latency of NCCL (nccl-tests issue 123)",
    f"{_ISSUES}/123",
    "ring all-reduce of 8 to 128 bytes on a DGX-A100: 2 GPUs 10 us, 3: 13.76, 4: 16.88, 5: 20.8, 6: 25.2, 7: 29.5, "
    "8: 33.7",
)
_LINE = "least-squares line through the seven times against 2 (N - 1) hops: 5.56 us + 1.98 us per hop"
_NVLINK = (
    "H100 all reduce performance is poor (nccl-tests issue 212)",
    f"{_ISSUES}/212",
    "With the protocol overhead (~20%) NCCL can get an effective NVLink bandwidth of 370GB/s",
)
_NIC = (
    "NCCL baseline performance (DeepEP issue 3)",
    "https://github.com/deepseek-ai/DeepEP/issues/3",
    "2 DGX-H100 nodes with 400G NIC, I can easily achieve 46 GBps busbw with 30 microseconds small message latency "
    "[...] nccl-tests alltoall with NVLink disabled",
)
_TCP_BANDWIDTH = (
    "Optimize NCCL AllReduce performance in 100Gbps TCP network (nccl issue 450)",
    "https://github.com/NVIDIA/nccl/issues/450",
    "four machines [...] each machine is equipped with 8 V100-32G cards, and the machines are interconnected by a "
    "100Gbps TCP network [...] the best performance (bus-bw) is between 4~6GB/s",
)
_TCP_LATENCY = (
    "NCCL Broadcast bus bandwidth higher than network bandwidth (nccl-tests issue 82)",
    f"{_ISSUES}/82",
    "broadcast of 8 bytes between 2 machines over TCP sockets: 45.82 us",
)
_H100 = (
    "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM",
    "https://www.nvidia.com/en-us/data-center/h100/",
)

_H100_NODE = {
    "collective": _microseconds(5.56, *_RING_LATENCY, f"{_LINE}; the intercept, on A100"),
    "hop_intra": _microseconds(1.98, *_RING_LATENCY, f"{_LINE}; the slope, on A100"),
    "message_intra": _microseconds(1.98, *_RING_LATENCY, "one hop each: messages do not overlap (upper bound)"),
    "ring_byte_intra": _rate(370e9, *_NVLINK, "bus bandwidth of a ring inside a node; NVLink SHARP is left out"),
    "exchange_byte_intra": _rate(370e9, *_NVLINK, "the same for an all-to-all inside a node"),
    "flop": _rate(67e12, *_H100, "FP64 Tensor Core 67 teraFLOPS", "peak; kernel launches are left out"),
    "memory_byte": _rate(3.35e12, *_H100, "GPU memory bandwidth 3.35TB/s", "peak; kernel launches are left out"),
}

CLUSTERS = {
    "infiniband": Cluster(
        title="H100 nodes of 8, NVLink 4, 8 x 400 Gb/s InfiniBand",
        gpus_per_node=8,
        memory_bytes=80e9,
        constants={
            **_H100_NODE,
            "hop_inter": _microseconds(
                7.17,
                "all_reduce_perf fails on 2 nodes (nccl-tests issue 150)",
                f"{_ISSUES}/150",
                "two nodes, one A100 of each, InfiniBand HDR: all-reduce of 8 bytes 19.90 us",
                "(19.90 - 5.56 us) / 2 hops",
            ),
            "message_inter": _microseconds(
                2.58,
                "NCCL alltoall tests failing at 256 GPUs (nccl-tests issue 78)",
                f"{_ISSUES}/78",
                "128 GPUs in 8 nodes of 16: alltoall of 512 bytes 323.9 us",
                "(323.9 - 5.56 - 15 x 1.98 us) / 112 messages to other nodes, on V100; the H100 figure used for "
                "bandwidth gives (30 - 5.56) / 15 = 1.63 us at 16 GPUs",
            ),
            "ring_byte_inter": _rate(8 * 46e9, *_NIC, "8 NICs of 46 GB/s carry the ring between two nodes together"),
            "exchange_byte_inter": _rate(46e9, *_NIC, "one NIC per GPU"),
        },
    ),
    "ethernet": Cluster(
        title="H100 nodes of 8, NVLink 4, 100 Gb/s Ethernet (TCP) per node",
        gpus_per_node=8,
        memory_bytes=80e9,
        constants={
            **_H100_NODE,
            "hop_inter": _microseconds(40.3, *_TCP_LATENCY, "45.82 - 5.56 us, one hop"),
            "message_inter": _microseconds(40.3, *_TCP_LATENCY, "one hop each: messages do not overlap (upper bound)"),
            "ring_byte_inter": _rate(5e9, *_TCP_BANDWIDTH, "the middle of 4 to 6 GB/s, per node"),
            "exchange_byte_inter": _rate(5e9 / 8, *_TCP_BANDWIDTH, "5 GB/s shared by the 8 GPUs of a node"),
        },
    ),
}

PEAK_BF16_FLOPS = 989e12
PEAK_BF16_SOURCE = (*_H100, "BFLOAT16 Tensor Core 1,979 teraFLOPS with sparsity", "half of it without sparsity")
MODEL_FLOPS_UTILIZATION = 0.40
MODEL_FLOPS_UTILIZATION_SOURCE = (
    "The Llama 3 Herd of Models",
    "https://arxiv.org/abs/2407.21783",
    "an overall BF16 Model FLOPs Utilization [...] of 38-43%",
    "their pre-training of 405B on 8,192 to 16,384 H100; assumed here for every model and number of GPUs",
)
