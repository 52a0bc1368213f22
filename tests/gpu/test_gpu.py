"""On a GPU: the kernels against the plain code, no waiting for the device, and training as the reference trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.algebra.decompositions import inverted
from reflora_dist.algebra.refactorization import solve_refactorization, solve_with_torch
from reflora_dist.algebra.tall_blocks import BlockSet
from reflora_dist.algebra.tensor_lists import PerTensor
from reflora_dist.collectives.communicator import Communicator, Counts
from reflora_dist.collectives.retile import Retiler
from reflora_dist.collectives.tiling import Layout
from reflora_dist.engines.base import Firing
from reflora_dist.methods.reference import ReferenceRefLoRA, refactorization
from reflora_dist.methods.registry import METHODS
from reflora_dist.step.gradient_step import GradientStep
from reflora_dist.step.method_optimizers import METHOD_OPTIMIZERS
from reflora_dist.step.solver import Solver
from tests.support.kernels import blocks_of_all_sizes
from tests.support.matrices import factor, relative
from tests.support.solving import stepped
from tests.support.workloads import build_model, named_factors, synthetic_workload, worst_factor_error

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
_SLEEP_CYCLES = 3 * 10**9  # more than a second


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device: torch says so, or work queued before is done when the block ends."""
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    slept = torch.cuda.Event()
    slept.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # libraries that torch calls (MAGMA) wait without its knowing
    assert not slept.query(), "the host has waited for the device"


def test_a_model_that_is_moved_after_attach_is_refused() -> None:
    """The step would go on where the model was."""
    workload = synthetic_workload(steps=1)
    model = build_model(workload)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    attach(model, optimizer, RefLoRAConfig(warmup_steps=0))
    model.to(CUDA)
    batch = workload.batches[0].to(CUDA)
    model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"sharded or moved after attach\(\)"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_compute_what_torch_computes(dtype: torch.dtype, seed: int) -> None:
    specs, lora_ranks, blocks = blocks_of_all_sizes(dtype, seed, CUDA)
    plain = BlockSet(specs, lora_ranks, CUDA, use_kernels=False)
    fused = BlockSet(specs, lora_ranks, CUDA, use_kernels=True)
    assert fused._tiled is not None
    assert (fused._tiled.locate("grams", blocks) is None) == (dtype == torch.bfloat16)  # left to the plain code
    expected, grams = plain.grams(blocks), fused.grams(blocks)
    for lora_rank in expected:
        assert relative(grams[lora_rank], expected[lora_rank]) < 1e-13
    matrices = {
        r: torch.randn(2, len(pairs), r, r, dtype=torch.float64, device=CUDA)
        for r, pairs in plain.pairs_by_rank.items()
    }
    copies = [None if block is None else block.clone() for block in blocks]
    plain.multiply_(copies, matrices)
    fused.multiply_(blocks, matrices)
    for block, copy in zip(blocks, copies, strict=True):
        if block is not None and copy is not None:  # both round once; sums in another order may round differently
            assert relative(block.double(), copy.double()) < (1e-13 if dtype == torch.float64 else 1e-7)


def test_equal_factors_have_bit_equal_grams() -> None:
    """Replicas solve by themselves, so a sum in a random order would let them drift apart."""
    specs, lora_ranks, blocks = blocks_of_all_sizes(torch.float32, 0, CUDA)
    fused = BlockSet(specs, lora_ranks, CUDA, use_kernels=True)
    first = fused.grams(blocks)
    for _ in range(20):
        again = fused.grams([None if block is None else block.clone() for block in blocks])
        assert all(torch.equal(again[lora_rank], first[lora_rank]) for lora_rank in first)


@pytest.mark.parametrize("lora_rank", [1, 3, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize(("cond_a", "cond_b"), [(1e0, 1e1), (1e2, 1e4), (1e4, 1e4)])
def test_s_on_the_gpu_is_that_of_the_reference(lora_rank: int, cond_a: float, cond_b: float) -> None:
    pairs = [
        (scale * factor(256, lora_rank, cond_a, seed).mT, factor(280, lora_rank, cond_b, seed + 50))
        for seed, scale in enumerate((1.0, 1e-4, 1e5))
    ]
    grams = [torch.stack([x @ x.mT if x is a else x.mT @ x for a, b in pairs for x in (a, b)][i::2]) for i in (0, 1)]
    s, s_inv, solved = solve_refactorization(grams[0].to(CUDA), grams[1].to(CUDA))
    assert solved.all()
    for index, (lora_a, lora_b) in enumerate(pairs):
        expected = refactorization(lora_a, lora_b)
        assert expected is not None
        assert relative(s[index].cpu(), expected[0]) < 1e-6
        assert relative(s_inv[index].cpu(), expected[1]) < 1e-6


def test_pairs_without_s_are_left_alone() -> None:
    good, short = factor(40, 16, 10.0, 0), factor(40, 16, 10.0, 1)
    short[:, 3] = short[:, 2]
    cases = [
        torch.zeros(16, 16).double(),
        short.mT @ short,
        torch.full((16, 16), float("nan")).double(),
        good.mT @ good,
    ]
    gram_a = torch.stack([good.mT @ good] * 4).to(CUDA)
    gram_b = torch.stack(cases).to(CUDA)
    s, s_inv, solved = solve_refactorization(gram_a, gram_b)
    assert solved.tolist() == solve_with_torch(gram_a, gram_b)[2].tolist() == [False, False, False, True]
    eye = torch.eye(16, dtype=torch.float64, device=CUDA)
    assert all(torch.equal(matrix, eye) for matrix in (*s[:3], *s_inv[:3]))


@pytest.mark.parametrize("method", ["reflora", "reflora-s"])
def test_training_follows_the_reference_and_never_waits(method: str) -> None:
    workload = synthetic_workload(seed=2)
    config = RefLoRAConfig(method=method, warmup_steps=1)

    def train(ours: bool) -> dict[str, Tensor]:
        model = build_model(workload).to(CUDA)
        factors = named_factors(model)
        optimizer = torch.optim.AdamW(factors.values(), lr=1e-3, fused=True)
        if ours:
            handle = attach(model, optimizer, config)
        else:
            values = list(factors.values())
            ReferenceRefLoRA(list(zip(values[0::2], values[1::2], strict=True)), optimizer, config)
        for step, batch in enumerate(workload.batches):
            optimizer.zero_grad()
            model(input_ids=batch.to(CUDA), labels=batch.to(CUDA)).loss.backward()
            with no_waiting() if ours and step > 2 else contextlib.nullcontext():  # the first steps plan and compile
                optimizer.step()
        if ours:
            assert handle.report().applied_steps == len(workload.batches) - 1 + (method == "reflora-s")
            assert not handle.report().skipped_pairs
            assert 0 < handle.figures()["step_ms"] < 1e4  # timed and kept while nothing waited
        return {name: value.detach().cpu() for name, value in factors.items()}

    assert worst_factor_error(train(ours=True), train(ours=False)) < 1e-5  # fp32 atomics of the backward


@pytest.mark.parametrize("lora_rank", [16, 64, 128])
def test_solving_never_waits(lora_rank: int) -> None:
    """Of many pairs: torch has other routines for few matrices than for many."""
    factors = torch.randn(2, 64, 3 * lora_rank, lora_rank, dtype=torch.float64, device=CUDA)
    gram_a, gram_b = factors.mT @ factors
    solve_refactorization(gram_a, gram_b)  # compiles
    with no_waiting():
        solved = solve_refactorization(gram_a, gram_b)[2]
    assert solved.all()


@pytest.mark.parametrize("lora_rank", [1, 5, 16, 24, 32, 64, 100, 128, 130])
def test_inverses_are_those_of_torch(lora_rank: int) -> None:
    matrices = torch.stack([factor(lora_rank, lora_rank, cond, 0) for cond in (1e0, 1e4, 1e8)]).to(CUDA)
    matrices = torch.stack([matrices, matrices.mT])
    inverses = inverted(matrices)
    for inverse, expected, cond in zip(
        inverses.unbind(1), torch.linalg.inv(matrices).unbind(1), (1e0, 1e4, 1e8), strict=True
    ):
        assert relative(inverse, expected) < 1e-14 * lora_rank * cond
    matrices[0, 1, 0, 0] = float("nan")
    matrices[1, 2] = 0.0
    inverses = inverted(matrices)
    assert not inverses[0, 1].isfinite().all() and not inverses[1, 2].isfinite().all()
    assert inverses[0, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sums_and_products_per_tensor_are_those_on_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(numel, device=CUDA).to(dtype) for numel in (0, 1000, 1, 999, 16384, 100_001)]
    tensors[1] = tensors[1][1:]  # begins off a 16-byte boundary
    copies: list[Tensor | None] = [tensor.cpu() for tensor in tensors]
    ours, plain = PerTensor(CUDA), PerTensor(torch.device("cpu"))
    assert ours._kernels is not None and ours._kernels.locate("sums", tensors) is not None
    for _ in range(2):
        for sums in (PerTensor.magnitudes, PerTensor.squares):
            assert (
                relative(sums(ours, tensors).cpu(), sums(plain, [copy for copy in copies if copy is not None])) < 1e-13
            )
    factors = torch.tensor([1.0, 3.0, -0.5, 1e-3, 0.7, 1.3], dtype=torch.float64)
    some: list[Tensor | None] = [*tensors]
    some[4] = copies[4] = None
    on_gpu = factors.to(CUDA)
    ours.scale_("tensors", some, torch.ones_like(on_gpu))  # plans
    with no_waiting():
        ours.scale_("tensors", some, on_gpu)
    plain.scale_("tensors", copies, factors)
    for tensor, copy in zip(some, copies, strict=True):
        if tensor is not None and copy is not None and copy.numel():
            assert relative(tensor.cpu().double(), copy.double()) < 4 * torch.finfo(dtype).eps


def test_sums_and_products_per_tensor_of_any_list() -> None:
    """Of several dtypes, of tensors that move between calls, and where some lie in host memory."""
    torch.manual_seed(0)
    ours, plain = PerTensor(CUDA), PerTensor(torch.device("cpu"))
    factors = torch.tensor([0.5, -2.0, 4.0, 0.25], dtype=torch.float64)  # nothing to round
    for last in (CUDA, CUDA, torch.device("cpu")):
        dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
        tensors = [torch.randn(n).to(dtype).to(CUDA) for n, dtype in zip((40_000, 7, 0, 20_000), dtypes, strict=True)]
        tensors[-1] = tensors[-1].to(last)
        copies = [tensor.cpu() for tensor in tensors]
        assert relative(ours.squares(tensors).cpu(), plain.squares(copies)) < 1e-13
        some = [tensors[0], None, *tensors[2:]]
        ours.scale_("tensors", some, factors.to(CUDA))
        plain.scale_("tensors", [copies[0], None, *copies[2:]], factors)
        assert all(torch.equal(tensor.cpu(), copy) for tensor, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("method", ["reflora-s", "scaled-gd", "lora-pro", "lora-rite", "lora-muon"])
def test_the_relatives_train_as_on_the_cpu_and_never_wait(method: str) -> None:
    """On a CPU they take eigenvectors, here iterations."""
    workload = synthetic_workload(seed=2, lora={"r": 24, "lora_alpha": 24})
    config = RefLoRAConfig(method=method, warmup_steps=0)

    def train(device: torch.device) -> dict[str, Tensor]:
        model = build_model(workload).to(device)
        factors = named_factors(model)
        optimizer: torch.optim.Optimizer
        if method in METHOD_OPTIMIZERS:
            optimizer = METHOD_OPTIMIZERS[method](factors.values(), lr=1e-3)
        else:
            optimizer = torch.optim.AdamW(factors.values(), lr=1e-3, fused=True)
        handle = attach(model, optimizer, config)
        for step, batch in enumerate(workload.batches):
            optimizer.zero_grad()
            model(input_ids=batch.to(device), labels=batch.to(device)).loss.backward()
            with no_waiting() if device == CUDA and step > 1 else contextlib.nullcontext():
                optimizer.step()
        assert handle.report().applied_steps == len(workload.batches)
        assert 0 < handle.figures()["step_ms"] < 1e4
        return {name: value.detach().cpu() for name, value in factors.items()}

    assert worst_factor_error(train(CUDA), train(torch.device("cpu"))) < 1e-4  # fp32 sums of the model in another order


@pytest.mark.parametrize("tall", [True, False])
@pytest.mark.parametrize("method", ["reflora", "scaled-gd", "lora-pro"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_steps_over_cut_factors_are_those_on_the_cpu(world_size: int, method: str, tall: bool) -> None:
    """Ranks are threads; with rows cut between neighbours, and with flat lora_A at their owners."""
    layouts = []
    for r, n_in, n_out in [(16, 96, 64), (8, 40, 33), (16, 96, 64)]:
        for rows, columns in ((n_in, not tall), (n_out, False)):
            layouts.append(Layout(rows, r, columns, chunk=-(-(rows * r + 8) // world_size), offset=8))
    on_gpu, expected, _, equal = stepped(layouts, world_size, method, firings=2, device=CUDA)
    assert equal
    for gpu, exact in zip(on_gpu, expected, strict=True):
        assert relative(gpu.double(), exact) < (1e-4 if method == "lora-pro" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tall", [True, False])
def test_a_step_over_cut_factors_never_waits(tall: bool, dtype: torch.dtype) -> None:
    """Alone among ranks that would send what this one sends."""
    layouts = [
        Layout(rows, 16, columns, chunk=rows * 8 - 8, offset=8)
        for rows, columns in ((96, not tall), (64, False), (80, not tall), (48, False))
    ]
    comm = _LoopedBack(3, rank=1)
    tensors = [[torch.randn(layout.piece(1).numel, device=CUDA).to(dtype) for layout in layouts] for _ in range(2)]
    engine = SimpleNamespace(
        pairs=[SimpleNamespace(lora_rank=16)] * 2,
        weights=lambda: tensors[0],
        gradients=lambda: tensors[1],
        has_half_gradients=lambda: dtype == torch.float16,
    )
    solver = Solver(METHODS["reflora"], RefLoRAConfig(), [1.0] * 2, [16] * 2, comm)
    step = GradientStep(engine, Retiler(layouts, comm), comm, solver, uses_gradients=False, carries_moments=False)  # type: ignore[arg-type]
    firing = Firing((True,) * 4, first=True, last=True)
    for number in range(3):
        with no_waiting() if number > 1 else contextlib.nullcontext():  # the first steps plan and compile
            step(firing, {})


class _LoopedBack(Communicator):
    """One rank's part of what several do, with what the others would send taken from its own buffer."""

    def __init__(self, world_size: int, rank: int) -> None:
        super().__init__(None, CUDA)
        self.world_size, self.rank = world_size, rank

    def all_to_all(self, send: Tensor, send_counts: Counts, receive_counts: Counts) -> Tensor:
        numel = sum(receive_counts.values())
        return send.repeat(-(-numel // max(1, send.numel())))[:numel]

    between_neighbours = all_to_all

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.world_size * tensor for tensor in tensors]
