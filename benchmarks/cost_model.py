"""What RefLoRA adds to one optimizer step, predicted for every way of doing it.

A step is counted in events (hops of a ring, messages, bytes, floating-point operations, ...), and its time is the sum
of count x seconds per event. The model is linear in the constants, so the same counts serve to fit the constants of a
machine to measurements and to predict clusters whose constants are known from elsewhere. Four ways, for pairs A
``[r, in]`` and B ``[out, r]`` that N ranks hold in equal flat pieces, factors and gradients float32, Grams float64:

| way | on the wire | computed by each rank |
|---|---|---|
| gather | all-gather of A, B, grad_A | Grams of whole factors, the solve; its piece of the gradients |
| retile | all-to-alls: A, grad_A, messages to owners; grad_A, messages back | A and solve of own pairs; 1 / N of B |
| grams | all-reduce of Grams (factors stored as whole rows of A^T and B) | a share 1 / N of A and B, the solve |
| backward | nothing: Grams in the forward, while the engine has whole factors gathered | all of it, per micro-batch |

Bytes that a rank sends, with ``sum A`` and ``sum B`` the numbers of elements and P the number of pairs: gather
``4 (N - 1) / N (2 sum A + sum B)``; the upper triangles of two Grams per pair in a ring all-reduce are
``2 (N - 1) / N x 8 x P r (r + 1)``; retile, on average, with M values in a message (``solving.message_values``),
``3 x 4 (N - 1) / N^2 sum A + 2 (N - 1) / N x 8 x P M``. Of that, a rank that owns p pairs sends ``(N - 1) 8 p M`` back:
where there are more ranks than pairs, p is 1 for some and 0 for the others, and it is the owners who are waited for.
What is exact where sizes do not divide is in ``cost_retiling``.

Run alone, this prints predictions only: ``python benchmarks/cost_model.py --models 7b --gpus 8 512``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, links
from benchmarks.cost_events import Constants, Counts, Topology, all_gather, all_reduce, all_to_all, scaled, seconds
from benchmarks.cost_retiling import GRAM_BYTES, LAYOUTS, Adapters, Retiling, retiling
from benchmarks.options import parse, require_positive

WAYS = ("gather", "retile", "grams", "backward")

_FACTOR_BYTES, _INDEX_BYTES = 4, 4
# The solve of one pair, in units of r^3: Cholesky factors, ten Newton steps of one inverse each, products.
_SOLVE_FLOPS = 40
# Read and written per element: a float64 copy is made and read; an applied product is written and rounded back, too.
_GRAM_TRAFFIC_BYTES, _APPLY_TRAFFIC_BYTES = 4 + 8 + 8, 4 + 8 + 8 + 8 + 8 + 4


def sent_bytes(way: str, adapters: Adapters, ranks: int, layout: str = "zero3") -> np.ndarray:
    """Bytes that each rank sends in one optimizer step, ``[ranks]``; a ring all-reduce counts 2 (N - 1) / N.

    Factors of which none is cut are not moved, and "retile" is "grams".

    Raises:
        ValueError: the way is not one of WAYS.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown; choose one of {', '.join(WAYS)}")
    grams = 2 * (ranks - 1) * adapters.gram_bytes // ranks
    if way == "gather":
        gathered = _FACTOR_BYTES * (2 * adapters.elements_a + adapters.elements_b)
        return np.full(ranks, (ranks - 1) * gathered // ranks)
    if way == "retile" and (plan := retiling(adapters, ranks, layout)).held.any():
        return _FACTOR_BYTES * (plan.moved(2)[0] + plan.moved(1)[1])
    return np.full(ranks, 0 if way == "backward" else grams)


def memory_bytes(way: str, adapters: Adapters, ranks: int, layout: str = "zero3") -> int:
    """Bytes that a rank needs beyond plain LoRA: Grams, S and its inverse, and what is gathered or exchanged.

    An exchange takes what is sent, what arrives, and that in the order of blocks. There, all of it is A, grad_A and
    messages; on the way back, the blocks of A and grad_A are still held. Int32 indices for every grain order it.
    """
    matrices = 4 * GRAM_BYTES * adapters.lora_rank**2
    everywhere = matrices * len(adapters.pairs)
    if way == "gather":
        return everywhere + _FACTOR_BYTES * (2 * adapters.elements_a + adapters.elements_b)
    if way != "retile" or not (plan := retiling(adapters, ranks, layout)).held.any():
        return everywhere
    there = plan.at_holders(2) + 2 * plan.at_owners(2)
    back = plan.at_owners(2) + plan.at_owners(1) + plan.at_holders(1)
    indices = (plan.at_owners(2) + plan.at_owners(1)) // plan.grain
    exchange = _FACTOR_BYTES * (np.maximum(there, back) + plan.pairs.sum() * plan.message) + _INDEX_BYTES * indices
    return everywhere + int((exchange + matrices * plan.pairs).max())


def compute(
    adapters: Adapters, gram_elements: float, apply_elements: float, *, times: int = 1, solved: float | None = None
) -> Counts:
    """Grams of so many elements of factors, products with so many elements of gradients, and so many pairs solved.

    Args:
        times: how often all of it is done.
        solved: all pairs by default.
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
    """So many pieces of tensors copied to or from one behind the other, and elements ordered by grains."""
    return {"piece": float(pieces), "packed": float(collected + ordered), "grain": ordered / grain}


def step_counts(
    way: str, adapters: Adapters, topology: Topology, *, layout: str = "zero3", micro_batches: int = 1
) -> list[list[Counts]]:
    """One optimizer step of the slowest rank: steps one after another, each a list of algorithms to choose from."""
    ranks, whole = topology.ranks, adapters.elements_a + adapters.elements_b
    reduction = [all_reduce(adapters.gram_bytes, topology, name) for name in ("ring", "tree")]
    if way == "gather":
        gathered = _FACTOR_BYTES * (2 * adapters.elements_a + adapters.elements_b)
        gathering = [all_gather(gathered, topology, name) for name in ("ring", "tree")]
        return [gathering, [compute(adapters, whole, whole / ranks)]]
    if way == "backward":
        return [[compute(adapters, whole, whole, times=micro_batches)]]
    if way == "grams" or not (plan := retiling(adapters, ranks, layout)).held.any():
        return [[compute(adapters, whole / ranks, whole / ranks)], reduction]
    return [[part] for part in _retile_counts(adapters, topology, plan)]


def _retile_counts(adapters: Adapters, topology: Topology, plan: Retiling) -> list[Counts]:
    """Computing, the exchange there and back, and packing; in each part the rank that has most to do is waited for."""
    elements = plan.stays.max() + plan.owned.max()
    computed = compute(adapters, elements, elements, solved=plan.pairs.max())
    computed["retiled"] = 1.0  # blocks that stay and blocks that arrive are computed on one after the other
    messages = plan.at_holders(0).max() + plan.at_owners(0).max()
    computed["memory_byte"] += 2 * _FACTOR_BYTES * float(messages)  # Grams and answers, both written and read
    # a link carries both directions at a time: the busier one of the busiest rank
    exchanges = [
        all_to_all(_FACTOR_BYTES * float(np.maximum(*plan.moved(channels)).max()), topology) for channels in (2, 1)
    ]
    # Holders collect what they send and write what comes back. Owners order what arrives, and what they send back.
    holders = plan.at_holders(2).max() + plan.at_holders(1).max()
    there, back = plan.at_owners(2).max(), plan.at_owners(1).max()
    pieces = 3 * plan.spans.max() + 2 * plan.messages
    return [computed, *exchanges, packing(pieces, holders, there + back, plan.grain)]


def step_seconds(steps: Sequence[Sequence[Counts]], constants: Constants) -> float:
    """The time of a step; of several algorithms the fastest, as communication libraries choose."""
    return sum(min(seconds(counts, constants) for counts in choices) for choices in steps)


def cluster_constants(cluster: links.Cluster) -> dict[str, float]:
    """A cluster's seconds per event. Kernel launches are left out; a ring's bandwidth includes its sums."""
    known = {name: constant.seconds for name, constant in cluster.constants.items()}
    return {
        **known,
        "solve_flop": known["flop"],
        "packed": 2 * _FACTOR_BYTES * known["memory_byte"],
        "grain": _INDEX_BYTES * known["memory_byte"],
        **dict.fromkeys(("step", "retiled", "pair", "piece", "reduce_byte"), 0.0),
    }


def matmul_parameters(shape: common.ModelShape) -> int:
    """Weights of a model that a token is multiplied with: all linears and the head."""
    layer = sum(n_in * n_out for _, n_in, n_out in shape.adapted_linears())
    return shape.num_layers * layer + shape.vocab_size * shape.hidden_size


@dataclasses.dataclass(kw_only=True)
class Scenario:
    """Which steps to predict."""

    models: list[str] = dataclasses.field(default_factory=lambda: ["7b", "13b", "70b", "405b"])
    gpus: list[int] = dataclasses.field(default_factory=lambda: [8, 64, 512, 4096])
    model_rank: int = dataclasses.field(default=16, metadata={"help": "r of the predicted adapters"})
    tokens_per_gpu: int = dataclasses.field(default=8192, metadata={"help": "tokens of one optimizer step"})
    micro_batches: int = dataclasses.field(default=4, metadata={"help": "backward passes per optimizer step"})

    def __post_init__(self) -> None:
        unknown = [model for model in self.models if model not in common.SHAPES]
        if unknown:
            raise ValueError(f"--models {' '.join(unknown)} unknown; choose from {', '.join(common.SHAPES)}")
        require_positive(self, "model_rank", "tokens_per_gpu", "micro_batches")
        if not self.gpus or min(self.gpus) < 1:
            raise ValueError(f"--gpus {self.gpus} must be one or more positive numbers")


def predict(scenario: Scenario) -> dict[str, Any]:
    """Predicted steps for every model, cluster, number of GPUs and way, and the constants with their sources.

    The training step that the addition is compared with takes 4 FLOP per token and weight (forward, and backward
    through frozen weights) at an assumed utilization; the base lies in bfloat16, evenly over all GPUs.
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
    shape = common.SHAPES[model]
    adapters = Adapters.of(shape, scenario.model_rank)
    topology = Topology(gpus, cluster.gpus_per_node)
    constants = cluster_constants(cluster)
    parameters = matmul_parameters(shape)
    rate = links.MODEL_FLOPS_UTILIZATION * links.PEAK_BF16_FLOPS
    step_ms = 1e3 * 4 * parameters * scenario.tokens_per_gpu / rate
    # the embedding is stored, though nothing is multiplied with it
    base_bytes = 2 * (parameters + shape.vocab_size * shape.hidden_size) / gpus
    rows = []
    for way, layout in ((way, layout) for way in WAYS for layout in LAYOUTS if way == "retile" or layout == "zero3"):
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
