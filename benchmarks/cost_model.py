"""What RefLoRA adds to one optimizer step, predicted for every way of doing it.

A step is counted in events (hops of a ring, messages, bytes, floating-point operations, ...), and its time is the sum
of count x seconds per event. The model is linear in the constants, so the same counts serve to fit the constants of a
machine to measurements and to predict clusters whose constants are known from elsewhere. Four ways, for pairs A
``[r, in]`` and B ``[out, r]`` that N ranks hold in equal flat pieces, factors and gradients float32, Grams float64:

| way | on the wire | computed by each rank |
|---|---|---|
| gather | all-gather of A, B, grad_A | Grams of whole factors; its piece of the gradients |
| retile | all-to-all of A and grad_A, all-reduce of Grams, all-to-all of grad_A | a share 1 / N of everything |
| grams | all-reduce of Grams (factors stored as whole rows of A^T and B) | a share 1 / N of everything |
| backward | nothing: Grams in the forward, while the engine has whole factors gathered | all of it, per micro-batch |

Bytes that a rank sends, with ``sum A`` and ``sum B`` the numbers of elements and P the number of pairs: gather
``4 (N - 1) / N (2 sum A + sum B)``; an all-to-all keeps 1 / N of each piece at home, so retile needs
``3 x 4 (N - 1) / N^2 sum A``; the upper triangles of two Grams per pair in a ring all-reduce are
``2 (N - 1) / N x 8 x P r (r + 1)``. What is exact where sizes do not divide is in ``retile_elements``.

Run alone, this prints predictions only: ``python benchmarks/cost_model.py --models 7b --gpus 8 512``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, links
from benchmarks.cost_events import Constants, Counts, Topology, all_gather, all_reduce, all_to_all, scaled, seconds
from reflora_dist.tiling import _column_bounds as column_bounds

WAYS = ("gather", "retile", "grams", "backward")
LAYOUTS = ("zero3", "fsdp2")

_FACTOR_BYTES, _GRAM_BYTES, _INDEX_BYTES = 4, 8, 4
# The solve of one pair, in units of r^3: Cholesky factors, ten Newton steps of one inverse each, products.
_SOLVE_FLOPS = 40
# Read and written per element: a float64 copy is made and read; an applied product is written and rounded back, too.
_GRAM_TRAFFIC_BYTES, _APPLY_TRAFFIC_BYTES = 4 + 8 + 8, 4 + 8 + 8 + 8 + 8 + 4


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The LoRA pairs of a model: ``(in, out)`` of each, all of rank r."""

    pairs: tuple[tuple[int, int], ...]
    lora_rank: int

    @classmethod
    def of(cls, shape: common.ModelShape, lora_rank: int) -> Adapters:
        layer = tuple((n_in, n_out) for _, n_in, n_out in shape.adapted_linears())
        return cls(layer * shape.num_layers, lora_rank)

    @property
    def elements_a(self) -> int:
        return self.lora_rank * sum(n_in for n_in, _ in self.pairs)

    @property
    def elements_b(self) -> int:
        return self.lora_rank * sum(n_out for _, n_out in self.pairs)

    @property
    def gram_bytes(self) -> int:
        """Upper triangles of both Grams of every pair."""
        return _GRAM_BYTES * len(self.pairs) * self.lora_rank * (self.lora_rank + 1)

    def elements_of_kinds(self) -> dict[tuple[int, int], int]:
        """How many pairs have each ``(in, out)``."""
        kinds: dict[tuple[int, int], int] = {}
        for pair in self.pairs:
            kinds[pair] = kinds.get(pair, 0) + 1
        return kinds


def retile_elements(adapters: Adapters, ranks: int, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Elements that each rank sends to others, ``[ranks]``: one channel there (weights, gradients) and back.

    ZeRO-3 cuts a factor into flat pieces of ``ceil(numel / N)``, FSDP2 into blocks of ``ceil(rows / N)`` rows; lora_B
    then stays whole rows under FSDP2. Columns of lora_A are dealt out in proportion to the pieces, a row of lora_B
    that is cut goes to the rank that holds its first element.

    Raises:
        ValueError: the layout is not one of LAYOUTS.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    there, back = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    r = adapters.lora_rank
    for (n_in, n_out), count in adapters.elements_of_kinds().items():
        sides = [_columns(r, n_in, _bounds((r, n_in), ranks, layout))]
        if layout == "zero3":
            sides.append(_cut_rows(r, _bounds((n_out, r), ranks, layout)))
        for sent, returned in sides:
            there += count * sent
            back += count * returned
    return there, back


def _bounds(shape: tuple[int, int], ranks: int, layout: str) -> np.ndarray:
    """Where the ranks' flat pieces begin and end, ``[ranks + 1]``."""
    units, width = (shape[0] * shape[1], 1) if layout == "zero3" else shape
    return np.minimum(np.arange(ranks + 1) * -(-units // ranks), units) * width


def _columns(r: int, columns: int, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start, stop = bounds[:-1], bounds[1:]
    first, last = _first_and_last_columns(r, columns, bounds)

    def before(position: np.ndarray) -> np.ndarray:
        """Elements before a flat position that lie in the columns from first to last."""
        return position // columns * (last - first) + np.clip(position % columns - first, 0, last - first)

    kept = before(stop) - before(start)
    return stop - start - kept, r * (last - first) - kept


def _first_and_last_columns(r: int, columns: int, bounds: np.ndarray) -> np.ndarray:
    """The columns that each rank computes on, ``[2, ranks]``, by the rule of the package."""
    held = np.flatnonzero(bounds[1:] > bounds[:-1])
    dealt = np.zeros((2, len(bounds) - 1), np.int64)
    split = column_bounds(columns, r * columns, bounds[held].tolist())
    dealt[:, held] = split[:-1], split[1:]
    return dealt


def _cut_rows(width: int, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start, stop = bounds[:-1], bounds[1:]
    first_whole = np.minimum(-(-start // width) * width, stop)
    last_whole = np.maximum(stop // width * width, first_whole)
    return first_whole - start, np.where(last_whole < stop, width - (stop - last_whole), 0)


def sent_bytes(way: str, adapters: Adapters, ranks: int, layout: str = "zero3") -> np.ndarray:
    """Bytes that each rank sends in one optimizer step, ``[ranks]``; a ring all-reduce counts 2 (N - 1) / N.

    Raises:
        ValueError: the way is not one of WAYS.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown; choose one of {', '.join(WAYS)}")
    grams = 2 * (ranks - 1) * adapters.gram_bytes // ranks
    if way == "gather":
        gathered = _FACTOR_BYTES * (2 * adapters.elements_a + adapters.elements_b)
        return np.full(ranks, (ranks - 1) * gathered // ranks)
    if way == "retile":
        there, back = retile_elements(adapters, ranks, layout)
        return _FACTOR_BYTES * (2 * there + back) + grams
    return np.full(ranks, grams if way == "grams" else 0)


def memory_bytes(way: str, adapters: Adapters, ranks: int, layout: str = "zero3") -> int:
    """Bytes that a rank needs beyond plain LoRA: Grams, S and its inverse, and what is gathered or exchanged.

    An exchange takes a send and a receive buffer of A and grad_A, and int32 indices for packing and unpacking there
    and back (six per grain of A, see ``grain``).
    """
    matrices = 4 * _GRAM_BYTES * len(adapters.pairs) * adapters.lora_rank**2
    if way == "gather":
        return matrices + _FACTOR_BYTES * (2 * adapters.elements_a + adapters.elements_b)
    if way == "retile" and ranks > 1:
        held = adapters.elements_a * _share_a(adapters, ranks, layout)
        return matrices + int((2 * 2 * _FACTOR_BYTES + 6 * _INDEX_BYTES / grain(adapters, ranks, layout)) * held)
    return matrices


def grain(adapters: Adapters, ranks: int, layout: str) -> int:
    """Elements that stay together throughout an exchange: all cuts are at multiples of it."""
    r = adapters.lora_rank
    cuts: list[int] = []
    for n_in, n_out in adapters.elements_of_kinds():
        bounds = _bounds((r, n_in), ranks, layout)
        cuts += [n_in, *(bounds % n_in).tolist(), *_first_and_last_columns(r, n_in, bounds).ravel().tolist()]
        if layout == "zero3":
            cuts += (_bounds((n_out, r), ranks, layout) % r).tolist()
    return math.gcd(*cuts)


def _share_a(adapters: Adapters, ranks: int, layout: str) -> float:
    """The largest part of lora_A on one rank: FSDP2 gives out whole rows, of which there are r."""
    return 1 / ranks if layout == "zero3" else -(-adapters.lora_rank // ranks) / adapters.lora_rank


def compute(adapters: Adapters, gram_elements: float, apply_elements: float, times: int = 1) -> Counts:
    """Grams of so many elements of factors, the solve of every pair, products with so many elements of gradients."""
    r, pairs = adapters.lora_rank, len(adapters.pairs)
    once = {
        "step": 1.0,
        "pair": float(pairs),
        "solve_flop": float(_SOLVE_FLOPS * pairs * r**3),
        "flop": 2.0 * r * (gram_elements + apply_elements),
        "memory_byte": _GRAM_TRAFFIC_BYTES * gram_elements + _APPLY_TRAFFIC_BYTES * apply_elements,
    }
    return scaled(once, times)


def packing(pieces: float, elements: float, grain: int) -> Counts:
    """Collecting so many pieces of tensors, and ordering their elements by grains, for an exchange."""
    return {"piece": float(pieces), "packed": float(elements), "grain": elements / grain}


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
        return [[compute(adapters, whole, whole, micro_batches)]]
    if way == "grams" or ranks == 1:
        return [[compute(adapters, whole / ranks, whole / ranks)], reduction]
    held_a = adapters.elements_a * _share_a(adapters, ranks, layout)
    held = held_a + adapters.elements_b / ranks
    there, back = (int(sent.max()) for sent in retile_elements(adapters, ranks, layout))
    exchanges = [_exchange(2, there, topology), _exchange(1, back, topology)]
    # two channels there and one back, packed by the sender and unpacked by the receiver
    packed = packing(3 * len(adapters.pairs), 2 * 3 * held_a, grain(adapters, ranks, layout))
    return [[compute(adapters, held, held)], reduction, *([exchange] for exchange in exchanges), [packed]]


def _exchange(channels: int, elements: int, topology: Topology) -> Counts:
    return all_to_all(channels * _FACTOR_BYTES * elements, topology)


def step_seconds(steps: Sequence[Sequence[Counts]], constants: Constants) -> float:
    """The time of a step; of several algorithms the fastest, as communication libraries choose."""
    return sum(min(seconds(counts, constants) for counts in choices) for choices in steps)


def cluster_constants(cluster: links.Cluster) -> dict[str, float]:
    """A cluster's seconds per event. Batched kernels cost nothing per pair; a ring's bandwidth includes its sums."""
    known = {name: constant.seconds for name, constant in cluster.constants.items()}
    return {
        **known,
        "solve_flop": known["flop"],
        "packed": 2 * _FACTOR_BYTES * known["memory_byte"],
        "grain": _INDEX_BYTES * known["memory_byte"],
        **dict.fromkeys(("step", "pair", "piece", "reduce_byte"), 0.0),
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
        for name in ("model_rank", "tokens_per_gpu", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
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
    from transformers import HfArgumentParser

    from benchmarks.reports.scaling import predictions_markdown

    (scenario,) = HfArgumentParser(Scenario).parse_args_into_dataclasses()
    print(predictions_markdown(predict(scenario)))


if __name__ == "__main__":
    main()
