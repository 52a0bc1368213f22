"""The multi-process harness itself: results, failures and hangs of ranks are reported as they are."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.cluster import run_ranks


def _sum_over_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor, str]:
    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    assert dist.get_world_size() == world_size
    return rank, total, os.environ["OMP_NUM_THREADS"]


def _second_rank_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the second rank had enough")
    dist.barrier()


def _every_rank_fails(rank: int, world_size: int) -> None:
    dist.barrier()  # or one that fails at once leaves others in the middle of connecting
    raise ValueError(f"rank number {rank} refuses")


def _first_rank_never_arrives(rank: int, world_size: int) -> None:
    if rank == 0:
        _sleep_for_ever()
    dist.barrier()


def _sleep_for_ever() -> None:
    while True:
        time.sleep(1)


def _exit_without_a_word(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)


def _group_exists(rank: int, world_size: int) -> bool:
    return dist.is_initialized()


@pytest.mark.parametrize("world_size", [1, 3])
def test_results_come_back_in_rank_order(world_size: int) -> None:
    """Each rank's own result lies at its index, tensors included, and the ranks talked to each other."""
    results = run_ranks(_sum_over_ranks, world_size, 10)
    expected = float(sum(range(10, 10 + world_size)))
    assert [rank for rank, _, _ in results] == list(range(world_size))
    assert [total.item() for _, total, _ in results] == [expected] * world_size
    assert [threads for _, _, threads in results] == ["1"] * world_size


def test_a_failing_rank_is_shown_and_the_others_are_ended() -> None:
    """The other rank waits in a barrier for ever, yet the failure is raised promptly with the cause in it."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the second rank had enough") as failure:
        run_ranks(_second_rank_fails, 2)
    assert time.monotonic() - start < 60, "the surviving rank was waited for"
    assert "rank 1 raised" in str(failure.value)
    assert "_second_rank_fails" in str(failure.value), "the traceback names the line that failed"


def test_every_failing_rank_is_shown() -> None:
    """What three ranks raise differs, and all three are needed to understand a disagreement."""
    with pytest.raises(RuntimeError) as failure:
        run_ranks(_every_rank_fails, 3)
    for rank in range(3):
        assert f"rank number {rank} refuses" in str(failure.value)


def test_a_hang_times_out_with_every_ranks_stack() -> None:
    """The stacks show who waits in a collective and who never came."""
    with pytest.raises(RuntimeError, match="timeout") as failure:
        run_ranks(_first_rank_never_arrives, 2, timeout=10)
    assert "_sleep_for_ever" in str(failure.value)
    assert "barrier" in str(failure.value)


def test_a_rank_that_dies_silently_is_reported() -> None:
    """A crash in native code leaves no traceback; its exit code must not be lost."""
    with pytest.raises(RuntimeError, match="rank 0 ended with exit code 7"):
        run_ranks(_exit_without_a_word, 2)


def test_the_group_is_optional() -> None:
    """Launchers' own initialisation can be tested on ranks that have no group yet."""
    assert run_ranks(_group_exists, 2, init_process_group=False) == [False, False]
