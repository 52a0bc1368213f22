"""Predict what RefLoRA adds to one optimizer step, for four ways of doing it.

A step is counted in events (hops of a ring, messages, bytes, floating-point operations, ...). Its time is the sum of
count x seconds per event. The model is linear in the constants. So the same counts serve to fit the constants of a
machine to measurements, and to predict clusters with published constants. The table is for pairs A and B ``[out, r]``
that N ranks hold in equal pieces, with float32 factors and gradients and float64 Gram matrices:

| way | lora_A | on the wire | computed by each rank |
|---|---|---|---|
| gather | any | all-gather of A, B, grad_A | Grams of whole factors, the solve; its piece of the gradients |
| flat | ``[r, in]`` | all-to-alls: A, grad_A; grad_A; all-reduce of Grams | A of own pairs, 1 / N of B, the solve |
| tall | ``[in, r]`` | all-reduce of Grams; rows that are cut, with neighbours | 1 / N of A and B, the solve |
| backward | any | nothing: Grams in the forward, with whole factors | all of it, per micro-batch |

The bytes of "flat" and "tall" come from the package's own plan (``reflora_dist.step.traffic``), for every rank. Where
ranks share out the solve, an all-gather of the solutions is added. With P pairs, and ``sum A`` and ``sum B``
elements, a rank sends

- gather: ``4 (N - 1) / N (2 sum A + sum B)`` bytes,
- the upper triangles of two Gram matrices per pair, in a ring all-reduce: ``2 (N - 1) / N x 8 x P r (r + 1)`` bytes,
- flat: on average ``3 x 4 (N - 1) / N^2 sum A`` bytes more. With more ranks than pairs, all ranks wait for the owners.

Run as a script, this module prints predictions only: ``python benchmarks/cost_model.py --models 7b --gpus 8 512``.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.costs.scenario import Scenario
from benchmarks.harness.options import parse
from reflora_dist.command_line.help import answer_help

if __name__ == "__main__":
    answer_help(__doc__, {"options": Scenario})  # before libraries are imported, which takes seconds

import numpy as np

from benchmarks.costs import links
from benchmarks.costs.events import (
    Constants,
    Counts,
    Topology,
    all_gather,
    all_reduce,
    all_to_all,
    messages,
    scaled,
    seconds,
)
from benchmarks.costs.traffic import FACTOR_BYTES, GRAM_BYTES, INDEX_BYTES, LAYOUTS, Adapters, Moved, moved
from benchmarks.harness import models

WAYS = ("gather", "flat", "tall", "backward")
_BY_LAYOUT = ("flat", "tall")  # ways whose cost depends on how the engine cuts factors
_ALGORITHMS = ("ring", "tree")
# The solve of one pair, in units of r^3: Cholesky factors, ten Newton steps of one inverse each, products.
_SOLVE_FLOPS = 40
# Read and written per element: a float64 copy is made and read; a product is also written and rounded back.
_GRAM_TRAFFIC_BYTES, _APPLY_TRAFFIC_BYTES = 4 + 8 + 8, 4 + 8 + 8 + 8 + 8 + 4


def sent_bytes(way: str, adapters: Adapters, ranks: int, layout: str = "zero3", device: str = "cuda") -> np.ndarray:
    """Return the bytes that each rank sends in one optimizer step, ``[ranks]``. A ring all-reduce counts 2 (N - 1) / N.

    Raises:
        ValueError: the way is not one of WAYS.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown; choose one of {', '.join(WAYS)}")
    if way not in _BY_LAYOUT:
        gathered = _gathered_bytes(adapters) if way == "gather" else 0
        return np.full(ranks, (ranks - 1) * gathered // ranks)
    plan = moved(adapters, ranks, layout, way == "tall", device)
    collectives = plan.traffic.sent_in_all_reduces + (ranks - 1) * plan.traffic.gathered
    there, back = plan.sent()
    return collectives + there + back


def memory_bytes(way: str, adapters: Adapters, ranks: int, layout: str = "zero3", device: str = "cuda") -> int:
    """Return the bytes that a rank needs beyond plain LoRA: Gram matrices, S and its inverse, and buffers."""
    everywhere = 4 * GRAM_BYTES * adapters.lora_rank**2 * len(adapters.pairs)
    if way == "gather":
        return everywhere + _gathered_bytes(adapters)
    if way == "backward":
        return everywhere
    return everywhere + int(moved(adapters, ranks, layout, way == "tall", device).buffers().max())


def _gathered_bytes(adapters: Adapters) -> int:
    return FACTOR_BYTES * (2 * adapters.elements_a + adapters.elements_b)


def compute(
    adapters: Adapters, gram_elements: float, apply_elements: float, *, times: int = 1, solved: float | None = None
) -> Counts:
    """Count the computations of a step: Gram matrices, products with gradients, and solved pairs.

    Args:
        adapters: the model's adapters.
        gram_elements: elements of factors that enter Gram matrices.
        apply_elements: elements of gradients that are multiplied.
        times: how often all of it is done.
        solved: number of pairs solved; all pairs by default.
    """
    r, pairs = adapters.lora_rank, len(adapters.pairs)
    solved = pairs if solved is None else solved
    once = {
        "step": 1.0,
        "pair": float(pairs),
        "solve_flop": float(_SOLVE_FLOPS * solved * r**3),
        "flop": 2.0 * r * (gram_elements + apply_elements),
        "memory_byte": _GRAM_TRAFFIC_BYTES * gram_elements + _APPLY_TRAFFIC_BYTES * apply_elements,
    }
    return scaled(once, times)


def packing(pieces: float, collected: float, ordered: float, grain: int) -> Counts:
    """Count packing: pieces of tensors copied into or out of one buffer, and elements reordered in grains."""
    return {"piece": float(pieces), "packed": float(collected + ordered), "grain": ordered / grain}


def step_counts(
    way: str,
    adapters: Adapters,
    topology: Topology,
    *,
    layout: str = "zero3",
    micro_batches: int = 1,
    device: str = "cuda",
) -> list[list[Counts]]:
    """Count one optimizer step of the slowest rank: a list of parts, each a list of algorithms to choose from."""
    ranks, whole = topology.ranks, adapters.elements_a + adapters.elements_b
    if way == "gather":
        gathered = _gathered_bytes(adapters)
        gathering = [all_gather(gathered, topology, name) for name in _ALGORITHMS]
        return [gathering, [compute(adapters, whole, whole / ranks)]]
    if way == "backward":
        return [[compute(adapters, whole, whole, times=micro_batches)]]
    plan = moved(adapters, ranks, layout, way == "tall", device)
    steps = [[all_reduce(plan.traffic.reduced, topology, name) for name in _ALGORITHMS]]
    solved = len(adapters.pairs)
    if plan.traffic.gathered:
        solved = -(-solved // ranks)
        steps.append([all_gather(ranks * plan.traffic.gathered, topology, name) for name in _ALGORITHMS])
    elements = plan.stays.max() + plan.owned.max()
    computed = compute(adapters, elements, elements, solved=solved)
    if plan.anything:
        computed["exchanged"] = 1.0  # blocks that stay and blocks that arrive are computed one after the other
        steps += [[part] for part in _exchange_counts(plan, topology)]
    return [[computed], *steps]


def _exchange_counts(plan: Moved, topology: Topology) -> list[Counts]:
    """Count the exchange there and back, and packing. Each part takes as long as the busiest rank."""
    there, back = plan.sent()
    # A link carries both directions at once, so the busier direction of the busiest rank counts.
    busiest = [float(max(there.max(), 2 * back.max())), float(max(back.max(), there.max() / 2))]
    if plan.traffic.neighbours:
        far, near = max(_far_and_near(peers, rank, topology) for rank, peers in enumerate(plan.peers))
        exchanges = [messages(sent, near, far) for sent in busiest]
    else:
        exchanges = [all_to_all(sent, topology, plan.partners) for sent in busiest]
    # Holders pack what they send and unpack what comes back. Owners reorder both.
    collected, ordered = 3 * plan.held.max(), 3 * plan.owned.max()
    return [*exchanges, packing(3 * plan.spans.max(), collected, ordered, plan.grain)]


def _far_and_near(peers: set[int], rank: int, topology: Topology) -> tuple[int, int]:
    """Return how many of a rank's peers are in other nodes, and how many in its own."""
    far = sum(peer // topology.ranks_per_node != rank // topology.ranks_per_node for peer in peers)
    return far, len(peers) - far


def step_seconds(steps: Sequence[Sequence[Counts]], constants: Constants) -> float:
    """Return the time of a step. Each part uses its fastest algorithm, as communication libraries do."""
    return sum(min(seconds(counts, constants) for counts in choices) for choices in steps)


def cluster_constants(cluster: links.Cluster) -> dict[str, float]:
    """Return a cluster's seconds per event. Kernel launches are left out; a ring's bandwidth includes its sums."""
    known = {name: constant.seconds for name, constant in cluster.constants.items()}
    return {
        **known,
        "solve_flop": known["flop"],
        "packed": 2 * FACTOR_BYTES * known["memory_byte"],
        "grain": INDEX_BYTES * known["memory_byte"],
        **dict.fromkeys(("step", "exchanged", "pair", "piece", "reduce_byte"), 0.0),
    }


def matmul_parameters(shape: models.ModelShape) -> int:
    """Return the number of weights that multiply a token: all linears and the head."""
    layer = sum(n_in * n_out for _, n_in, n_out in shape.adapted_linears())
    return shape.num_layers * layer + shape.vocab_size * shape.hidden_size


def predict(scenario: Scenario) -> dict[str, Any]:
    """Predict steps for every model, cluster, number of GPUs and way. Return them with the constants and their sources.

    The training step, for comparison, takes 4 FLOP per token and weight (forward, and backward through frozen weights)
    at an assumed utilization. The base is in bfloat16, evenly over all GPUs.
    """
    rows = [
        row
        for model in scenario.models
        for name, cluster in links.CLUSTERS.items()
        for gpus in scenario.gpus
        for row in _rows(scenario, model, name, cluster, gpus)
    ]
    return {
        "rows": rows,
        "clusters": {name: dataclasses.asdict(cluster) for name, cluster in links.CLUSTERS.items()},
        "assumptions": {
            **dataclasses.asdict(scenario),
            "model_flops_utilization": links.MODEL_FLOPS_UTILIZATION,
            "model_flops_utilization_source": links.MODEL_FLOPS_UTILIZATION_SOURCE,
            "peak_flops": links.PEAK_BF16_FLOPS,
            "peak_flops_source": links.PEAK_BF16_SOURCE,
        },
    }


def _rows(scenario: Scenario, model: str, name: str, cluster: links.Cluster, gpus: int) -> list[dict[str, Any]]:
    shape = models.SHAPES[model]
    adapters = Adapters.of(shape, scenario.model_rank)
    topology = Topology(gpus, cluster.gpus_per_node)
    constants = cluster_constants(cluster)
    parameters = matmul_parameters(shape)
    rate = links.MODEL_FLOPS_UTILIZATION * links.PEAK_BF16_FLOPS
    step_ms = 1e3 * 4 * parameters * scenario.tokens_per_gpu / rate
    # the embedding is stored, too, though it multiplies nothing
    base_bytes = 2 * (parameters + shape.vocab_size * shape.hidden_size) / gpus
    rows = []
    for way, layout in itertools.product(WAYS, LAYOUTS):
        if way not in _BY_LAYOUT and layout != LAYOUTS[0]:
            continue
        steps = step_counts(way, adapters, topology, layout=layout, micro_batches=scenario.micro_batches)
        rows.append(
            {
                "model": model,
                "cluster": name,
                "gpus": gpus,
                "way": way,
                "layout": layout,
                "added_ms": 1e3 * step_seconds(steps, constants),
                "training_step_ms": step_ms,
                "sent_bytes": int(sent_bytes(way, adapters, gpus, layout).max()),
                "memory_bytes": memory_bytes(way, adapters, gpus, layout),
                "base_fits": base_bytes < cluster.memory_bytes,
            }
        )
    return rows


def main() -> None:
    from benchmarks.reports.scaling import predictions_markdown

    print(predictions_markdown(predict(parse(Scenario))))


if __name__ == "__main__":
    main()
