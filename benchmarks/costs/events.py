"""Count the events of a step that cost time, and fit the seconds per event to measurements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

Counts = dict[str, float]
Constants = Mapping[str, float]

_REWEIGHTINGS = 20


@dataclasses.dataclass(frozen=True)
class Topology:
    """The number of ranks, and the number of ranks per node."""

    ranks: int
    ranks_per_node: int

    @property
    def local(self) -> int:
        return min(self.ranks, self.ranks_per_node)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


def merge(*parts: Counts) -> Counts:
    """Return the sum of counts."""
    total: Counts = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0.0) + count
    return total


def scaled(counts: Counts, factor: float) -> Counts:
    """Return ``factor`` times the counts."""
    return {name: factor * count for name, count in counts.items()}


def seconds(counts: Counts, constants: Constants) -> float:
    """Return the time of counted events. Raise KeyError if a constant is missing."""
    return sum(count * constants[name] for name, count in counts.items() if count)


def on_shared_cores(counts: Counts, ranks: int, cores: int) -> Counts:
    """Return the counts of a rank that shares CPU cores, and in each collective waits for ranks without a core."""
    waits = {"wait": counts.get("collective", 0.0) * max(0, ranks - cores)}
    return {**scaled(counts, max(1.0, ranks / cores)), **waits}


def all_reduce(payload_bytes: float, topology: Topology, algorithm: str = "ring") -> Counts:
    """Count an all-reduce of ``payload_bytes`` on every rank, ring or tree (fewer hops); nothing on one rank."""
    if topology.ranks == 1:
        return {}
    local, nodes = topology.local, topology.nodes
    if algorithm == "tree":
        hops = {"hop_intra": 2.0 * (local - 1), "hop_inter": 2.0 * math.ceil(math.log2(nodes))}
    else:
        hops = {"hop_intra": 2.0 * (topology.ranks - nodes), "hop_inter": 2.0 * (nodes - 1)}
    ring_bytes = 2 * (topology.ranks - 1) / topology.ranks * payload_bytes
    return {"collective": 1.0, **hops, **_ring_bytes(ring_bytes, topology), "reduce_byte": payload_bytes}


def all_gather(total_bytes: float, topology: Topology, algorithm: str = "ring") -> Counts:
    """Count an all-gather to ``total_bytes`` on every rank. "tree" gathers between nodes in log2 rounds."""
    if topology.ranks == 1:
        return {}
    nodes = topology.nodes
    if algorithm == "tree":
        hops = {"hop_intra": topology.local - 1.0, "hop_inter": float(math.ceil(math.log2(nodes)))}
    else:
        hops = {"hop_intra": float(topology.ranks - nodes), "hop_inter": nodes - 1.0}
    ring_bytes = (topology.ranks - 1) / topology.ranks * total_bytes
    return {"collective": 1.0, **hops, **_ring_bytes(ring_bytes, topology)}


def all_to_all(sent_bytes: float, topology: Topology, peers: int | None = None) -> Counts:
    """Count a pairwise all-to-all with one message to every other rank that gets something.

    Args:
        sent_bytes: bytes that the busiest rank sends to the others, or receives from them, in equal parts.
        topology: the ranks.
        peers: number of the others, all by default; ranks of the same node are counted first.
    """
    peers = topology.ranks - 1 if peers is None else min(peers, topology.ranks - 1)
    near = min(topology.local - 1, peers)
    return messages(sent_bytes, near, peers - near)


def messages(sent_bytes: float, near: int, far: int) -> Counts:
    """Count the point-to-point messages of one exchange.

    Args:
        sent_bytes: bytes that the busiest rank sends to the others, or receives from them, in equal parts.
        near: number of its peers in the same node.
        far: number of its peers in other nodes.
    """
    peers = near + far
    if not peers:
        return {}
    return {
        "collective": 1.0,
        "message_intra": float(near),
        "message_inter": float(far),
        "exchange_byte_intra": sent_bytes * near / peers,
        "exchange_byte_inter": sent_bytes * far / peers,
    }


def _ring_bytes(ring_bytes: float, topology: Topology) -> Counts:
    # a ring passes through every node once per channel, so between nodes it uses all network cards of a node
    return {"ring_byte_intra" if topology.nodes == 1 else "ring_byte_inter": ring_bytes}


def fit(rows: Sequence[tuple[Counts, float]]) -> dict[str, float]:
    """Fit non-negative seconds per event by least squares of ``(model - measured)^2 / (model x measured)``.

    That is nearly the squared logarithm of their ratio. Half and twice the measured time are equally wrong, for short
    and long times.

    Args:
        rows: counts and measured seconds.

    Raises:
        ValueError: a measured time is not positive.
    """
    measured = np.array([time for _, time in rows])
    if (measured <= 0).any():
        raise ValueError("a measured time is not positive: leave that measurement out")
    names = sorted({name for counts, _ in rows for name in counts})
    matrix = np.array([[counts.get(name, 0.0) for name in names] for counts, _ in rows])
    model, constants = measured, np.zeros(len(names))
    for _ in range(_REWEIGHTINGS):
        weights = 1 / np.sqrt(measured * np.maximum(model, measured / 100))
        constants = _non_negative(matrix * weights[:, None], measured * weights)
        model = matrix @ constants
    return dict(zip(names, constants.tolist(), strict=True))


def _non_negative(matrix: np.ndarray, target: np.ndarray, sweeps: int = 5_000) -> np.ndarray:
    """Return ``argmin |matrix x - target|`` over ``x >= 0``, by coordinate descent."""
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0] = 1
    unit = matrix / norms
    normal, right = unit.T @ unit, unit.T @ target
    x = np.zeros(len(norms))
    for _ in range(sweeps):
        before = x.copy()
        for j in range(len(x)):
            x[j] = max(0.0, x[j] + right[j] - normal[j] @ x)
        if np.abs(x - before).max() <= 1e-10 * x.max():
            break
    return x / norms
