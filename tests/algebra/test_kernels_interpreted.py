"""The kernels' arithmetic without a GPU: Triton's interpreter runs them on the CPU, against the plain torch code.

All of them run, by the launch code that a GPU has. What the interpreter cannot do is left to ``tests/gpu/test_gpu.py``:

- ``scale_kernel`` on bfloat16, which can be read here but not written: Triton 3.7 takes the integer part of a float64
  that is to be rounded to bfloat16.
- Whether a kernel compiles for a GPU, whether accesses are as aligned as it says, and whether its threads wait for
  each other where they must. Here a program is one thread, and programs run one after the other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.algebra import kernel_check, kernels
from reflora_dist.algebra.tall_blocks import BlockSet
from reflora_dist.algebra.tensor_lists import PerTensor
from reflora_dist.algebra.types import SIDE_A, BlockSpec
from reflora_dist.methods.reference import ReferenceRefLoRA
from tests.support.kernels import ROUNDING, blocks_of_all_sizes, needs_interpreter
from tests.support.matrices import relative
from tests.support.small import small_batches, small_model, train_small, trainable
from tests.support.workloads import named_factors, worst_factor_error

pytestmark = needs_interpreter
CPU = torch.device("cpu")
# In float32 both round the same product once; sums in another order may round a few elements the other way.
ROUNDED_ONCE = {torch.float64: ROUNDING, torch.float32: 1e-7}
# What any of the mistakes that are made on purpose is above.
MISTAKE = 1e-3


def _plain_and_fused(specs: list[BlockSpec], lora_ranks: list[int]) -> tuple[BlockSet, BlockSet]:
    plain, fused = (BlockSet(specs, lora_ranks, CPU, use_kernels=use) for use in (False, True))
    assert plain._tiled is None and fused._tiled is not None
    return plain, fused


def _copies(blocks: list[Tensor | None]) -> list[Tensor | None]:
    return [None if block is None else block.clone() for block in blocks]


def _any_matrices(blocks: BlockSet) -> dict[int, Tensor]:
    return {r: torch.randn(2, len(pairs), r, r, dtype=torch.float64) for r, pairs in blocks.pairs_by_rank.items()}


def _block_errors(dtype: torch.dtype, seed: int) -> dict[str, list[float]]:
    """Grams are formed again with the blocks elsewhere in memory and others absent, among them all of r = 8."""
    specs, lora_ranks, blocks = blocks_of_all_sizes(dtype, seed, CPU)
    plain, fused = _plain_and_fused(specs, lora_ranks)
    elsewhere = [None if position in (0, 14, 15) else block for position, block in enumerate(_copies(blocks))]
    grams = []
    for some in (blocks, elsewhere):
        assert fused._tiled is not None and fused._tiled.locate("grams", some) is not None
        expected, ours = plain.grams(some), fused.grams(some)
        grams += [_relative(ours[r], expected[r]) for r in expected]
    copies, matrices = _copies(blocks), _any_matrices(plain)
    plain.multiply_(copies, matrices)
    fused.multiply_(blocks, matrices)
    pairs = [(x, y) for x, y in zip(blocks, copies, strict=True) if x is not None and y is not None]
    return {"Grams": grams, "products": [_relative(x, y) for x, y in pairs]}


def _relative(value: Tensor, expected: Tensor) -> float:
    """Also where nothing is expected."""
    return 0.0 if torch.equal(value, expected) else relative(value.double(), expected.double())


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 2), (torch.float64, 1)], ids=str)
def test_grams_and_products_are_those_of_torch(interpreted: Any, dtype: torch.dtype, seed: int) -> None:
    errors = interpreted(_block_errors, dtype, seed)
    assert len(errors["Grams"]) == 12 and len(errors["products"]) == 16
    assert max(errors["Grams"]) < ROUNDING
    assert max(errors["products"]) < ROUNDED_ONCE[dtype]


def _both_orientations(lora_rank: int, rows: int) -> bool:
    torch.manual_seed(lora_rank)
    tall = torch.randn(rows, lora_rank)
    specs = [BlockSpec(0, SIDE_A, (lora_rank, rows), columns=True), BlockSpec(1, SIDE_A, (rows, lora_rank), False)]
    _, fused = _plain_and_fused(specs, [lora_rank] * 2)
    blocks: list[Tensor | None] = [tall.mT.contiguous(), tall.clone()]
    as_columns, as_rows = fused.grams(blocks)[lora_rank][SIDE_A]
    matrices = torch.randn(lora_rank, lora_rank, dtype=torch.float64).expand(2, 2, -1, -1)
    fused.multiply_(blocks, {lora_rank: matrices})
    assert blocks[0] is not None and blocks[1] is not None
    return torch.equal(as_columns, as_rows) and torch.equal(blocks[0].mT, blocks[1])


@pytest.mark.parametrize(
    ("lora_rank", "rows"),
    [
        (1, 300),
        (5, 77),
        (32, 530),
        *(pytest.param(*size, marks=pytest.mark.all_ranks) for size in [(8, 8), (16, 16), (64, 70)]),
    ],
)
def test_the_orientation_in_memory_changes_no_bit(interpreted: Any, lora_rank: int, rows: int) -> None:
    """One tall factor as [r, rows] and as [rows, r], also where the shape does not tell which it is."""
    assert interpreted(_both_orientations, lora_rank, rows)


def _blocks_of_16_bits(dtype: torch.dtype) -> tuple[bool, bool, float]:
    import triton.language as tl

    from reflora_dist.algebra.kernels import launch

    specs, lora_ranks, blocks = blocks_of_all_sizes(dtype, 0, CPU)
    plain, fused = _plain_and_fused(specs, lora_ranks)
    assert fused._tiled is not None
    refused = all(fused._tiled.locate(purpose, blocks) is None for purpose in ("grams", "products"))
    expected, grams = plain.grams(blocks), fused.grams(blocks)
    same = all(torch.equal(grams[r], expected[r]) for r in expected)
    copies, matrices = _copies(blocks), _any_matrices(plain)
    plain.multiply_(copies, matrices)
    fused.multiply_(blocks, matrices)
    pairs = [(x, y) for x, y in zip(blocks, copies, strict=True) if x is not None and y is not None]
    same = same and all(torch.equal(x, y) for x, y in pairs)
    by_torch = plain.grams(blocks)
    with mock.patch.dict(launch._TRITON_DTYPES, {dtype: getattr(tl, str(dtype).removeprefix("torch."))}):
        assert fused._tiled.locate("grams", blocks) is not None
        by_kernel = fused.grams(blocks)
    return refused, same, max(relative(by_kernel[r], by_torch[r]) for r in by_torch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_16_bits_are_left_to_torch(interpreted: Any, dtype: torch.dtype) -> None:
    """A GPU's compiler refuses them. The Grams' arithmetic would be right: their elements are exact in float64."""
    refused, same, error = interpreted(_blocks_of_16_bits, dtype)
    assert refused and same
    assert error < ROUNDING


def _own_check(lora_rank: int) -> dict[str, float]:
    from reflora_dist.algebra import kernel_errors

    return {
        "blocks": kernel_errors.block_error(lora_rank, CPU, aligned=True),
        "unaligned blocks": kernel_errors.block_error(lora_rank, CPU, aligned=False),
        "inverses": kernel_errors.inverse_error(lora_rank, CPU),
        "S": kernel_errors.solve_error(lora_rank, CPU),
    }


@pytest.mark.parametrize("lora_rank", [1, 5, 32])
def test_the_packages_own_check_passes(interpreted: Any, lora_rank: int) -> None:
    """Of well-conditioned matrices, so that float32's products are what differs most."""
    errors = interpreted(_own_check, lora_rank)
    assert max(errors.pop("blocks"), errors.pop("unaligned blocks")) < ROUNDED_ONCE[torch.float32]
    assert max(errors.values()) < 1e-12  # some hundred roundings, times condition numbers below 100


@contextlib.contextmanager
def _replaced(where: Any, name: str, change: Callable[..., Any]) -> Iterator[None]:
    """Where ``name`` is called, ``change(original, *arguments)`` is."""
    original = getattr(where, name)
    with mock.patch.object(where, name, lambda *arguments: change(original, *arguments)):
        yield


def _planned(change: Callable[[Any], Any], original: Any, blocks: Any, *arguments: Any) -> list[Any]:
    return [change(launch) for launch in original(blocks, *arguments)]


def _turned(launch: Any) -> Any:
    return dataclasses.replace(launch, columns=not launch.columns)


def _of_the_other_side(launch: Any) -> Any:
    """Of two pairs: the Grams of lora_A are the first two of four."""
    tiles = launch.tiles.clone()
    tiles[:, 4] = (tiles[:, 4] + 2) % 4
    return dataclasses.replace(launch, tiles=tiles, slots=tuple((slot + 2) % 4 for slot in launch.slots))


def _of_the_other_pair(launch: Any) -> Any:
    tiles = launch.tiles.clone()
    tiles[:, 4] ^= 1
    return dataclasses.replace(launch, tiles=tiles)


def _without_the_last_row(launch: Any) -> Any:
    tiles = launch.tiles.clone()
    tiles[-1, 2] -= 1
    return dataclasses.replace(launch, tiles=tiles)


def _with_transposed_matrices(original: Any, blocks: Any, located: Any, matrices: dict[int, Tensor]) -> None:
    original(blocks, located, {r: of_rank.mT for r, of_rank in matrices.items()})


def _with_sides_exchanged(original: Any, gram_a: Tensor, gram_b: Tensor, *settings: Any) -> Any:
    return original(gram_b, gram_a, *settings)


def _all_solved(original: Any, *arguments: Any) -> Any:
    s, s_inv, solved = original(*arguments)
    return s, s_inv, torch.ones_like(solved)


def _transposed(original: Any, matrices: Tensor) -> Tensor:
    return original(matrices).mT


_MISTAKES: dict[str, tuple[str, str, Any]] = {
    "orientation": ("blocks", "_plan_launches", functools.partial(_planned, _turned)),
    "side": ("blocks", "_plan_launches", functools.partial(_planned, _of_the_other_side)),
    "pair": ("blocks", "_plan_launches", functools.partial(_planned, _of_the_other_pair)),
    "a row too few": ("blocks", "_plan_launches", functools.partial(_planned, _without_the_last_row)),
    "transposed matrices": ("blocks", "multiply_", _with_transposed_matrices),
    "sides exchanged": ("S", "solve", _with_sides_exchanged),
    "all solved": ("S", "solve", _all_solved),
    "transposed inverses": ("inverses", "invert", _transposed),
}


def _error_with(mistake: str) -> float:
    from reflora_dist.algebra import kernel_errors
    from reflora_dist.algebra.kernels import launch

    what, name, change = _MISTAKES[mistake]
    with _replaced(launch.TiledBlocks if what == "blocks" else kernel_errors, name, change):
        if what == "blocks":
            return kernel_errors.block_error(5, CPU, aligned=True)
        return kernel_errors.solve_error(5, CPU) if what == "S" else kernel_errors.inverse_error(5, CPU)


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_the_packages_own_check_can_fail(interpreted: Any, mistake: str) -> None:
    assert interpreted(_error_with, mistake) > MISTAKE


def _per_tensor(dtype: torch.dtype) -> tuple[float, list[bool], float]:
    """Errors of sums, whether products are exact, and how far a mistake in the order of the factors is off."""
    from reflora_dist.algebra.kernels.tensor_lists import PerTensorKernels

    torch.manual_seed(0)
    tensors: list[Tensor | None] = [torch.randn(n).to(dtype) for n in (0, 1000, 1, 999, 16384, 40_001)]
    assert tensors[1] is not None
    tensors[1] = tensors[1][1:]  # begins off a 16-byte boundary
    tensors += [torch.randn(33), None]  # of another dtype, and none at all
    ours, plain = PerTensorKernels(CPU), PerTensor(CPU)
    present = [tensor for tensor in tensors if tensor is not None]
    errors = []
    for squared, sums in ((False, plain.magnitudes), (True, plain.squares)):
        located = ours.locate("sums", tensors)
        assert located is not None
        totals = ours.totals(located, squared)
        assert totals[-1] == 0 and totals[0] == 0
        errors.append(float(((totals[1:-1] - sums(present)[1:]) / sums(present)[1:]).abs().max()))
    if dtype == torch.bfloat16:
        return max(errors), [], 1.0
    factors = torch.tensor([1.0, 3.0, -0.5, 1e-3, 0.7, 1.3, -2.3, 1.0], dtype=torch.float64)
    expected = [(x.double() * f).to(x.dtype) for x, f in zip(present, factors[:-1], strict=True)]
    wrong = [(x.double() * f).to(x.dtype) for x, f in zip(present, factors[1:], strict=True)]
    located = ours.locate("tensors", tensors)
    assert located is not None
    ours.scale_(located, factors)
    mistake = min(relative(x.double(), y.double()) for x, y in zip(present[1:], wrong[1:], strict=True))
    return max(errors), [torch.equal(x, y) for x, y in zip(present, expected, strict=True)], mistake


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_sums_and_products_per_tensor_are_those_of_torch(interpreted: Any, dtype: torch.dtype) -> None:
    """Sums in another order; products of two float64 numbers rounded once, which have only one result."""
    error, exact, mistake = interpreted(_per_tensor, dtype)
    assert error < ROUNDING
    assert all(exact)
    assert mistake > MISTAKE


def _trained(method: str) -> tuple[float, float, dict[str, int]]:
    """Error of training by the kernels; that of no method at all; how often each was launched."""
    from reflora_dist.algebra.kernels import launch
    from reflora_dist.algebra.kernels import tensor_lists as per_tensor

    config = RefLoRAConfig(method=method, warmup_steps=0)
    batches = small_batches(steps=3)

    def train(start: Callable[[Any, Any], Any]) -> dict[str, Tensor]:
        model = small_model(r=5)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        start(model, optimizer)
        return train_small(model, optimizer, batches)

    def reference(model: Any, optimizer: Any) -> None:
        values = list(named_factors(model).values())
        ReferenceRefLoRA(list(zip(values[0::2], values[1::2], strict=True)), optimizer, config)

    launches: dict[str, int] = collections.Counter()

    def counted(name: str, original: Any, *arguments: Any) -> Any:
        launches[name] += 1
        return original(*arguments)

    expected, without = train(reference), train(lambda *_: None)
    with contextlib.ExitStack() as stack:
        for where, name in ((kernels, "usable"), (kernel_check, "kernels_work")):
            stack.enter_context(mock.patch.object(where, name, lambda *_: True))
        for where, names in (
            (launch.TiledBlocks, ("grams", "multiply_")),
            (launch, ("solve",)),
            (per_tensor.PerTensorKernels, ("totals", "scale_")),
        ):
            for name in names:
                stack.enter_context(_replaced(where, name, functools.partial(counted, name)))
        ours = train(lambda model, optimizer: attach(model, optimizer, config))
    return worst_factor_error(ours, expected), worst_factor_error(without, expected), dict(launches)


@pytest.mark.parametrize(
    ("method", "launched"), [("reflora", {"grams", "solve", "multiply_"}), ("reflora-s", {"totals", "scale_"})]
)
def test_training_by_the_kernels_follows_the_reference(interpreted: Any, method: str, launched: set[str]) -> None:
    """In float64, where three steps of Adam leave nothing of what rounding differs."""
    error, without, launches = interpreted(_trained, method)
    assert set(launches) >= launched and min(launches[name] for name in launched) >= 3
    assert error < 1e-9
    assert without > MISTAKE
