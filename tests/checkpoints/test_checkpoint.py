"""The adapter and the training state survive a save under every raw engine, on the same and on other numbers of ranks.

Training is that of the synthetic workload, clipped, with a warm-up of one step and an interval of two: a schedule
that restarts, a moment that is lost or a factor that is stale shows in the factors.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from reflora_dist import attach
from reflora_dist.checkpoints.deepspeed_universal import was_round_robin
from reflora_dist.checkpoints.training_state import load_checkpoint, save_adapter, save_checkpoint
from tests.support.checkpoints import (
    SAVED_AT,
    STEPS,
    as_float,
    assert_no_frozen_base,
    convert_to_universal,
    method_config,
    wrapped_workload,
)
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES, WITHOUT_TALL
from tests.support.engines_under_test.common import mean_over_ranks, train_on
from tests.support.refusals import message_of
from tests.support.workloads import (
    Factors,
    synthetic_workload,
    worst_factor_error,
    worst_loss_error,
)

# "+tall": lora_A stored tall
OWN_LOOP = [name for name, engine in ENGINES.items() if not engine.takes_callback]
OWN_LOOP += [f"{name}+tall" for name in OWN_LOOP if name not in WITHOUT_TALL]
ZERO = ("zero1", "zero2", "zero3", "zero3-two-groups", "zero1-bf16")
OTHER_RANKS_TOLERANCE = 1e-5  # another number of ranks sums gradients in another order; measured 8e-8
# DDP and ZeRO-1/2 cut their first step's buckets differently, so a fresh process sums in another order; measured 7e-8
REBUCKETED_TOLERANCE = 1e-6
BF16_TOLERANCE = 2e-2  # bf16 gradients summed in another order; measured 3e-3


class Outcome(NamedTuple):
    """What a rank saw: losses and factors after the checkpoint, and its handle's state."""

    losses: list[float]
    at_checkpoint: Factors
    factors: Factors
    handle: dict[str, Any]


def _train_and_save(
    rank: int, world_size: int, engine_name: str, method: str, folder: str, saved_at: int = SAVED_AT
) -> Outcome:
    """Train without interruption, saving on the way."""
    workload, wrapped = wrapped_workload(engine_name, world_size, method=method)
    handle = attach(wrapped.model, wrapped.optimizer, method_config(method))
    losses, at_checkpoint = [], {}
    for step, batch in enumerate(workload.batches):
        if step == saved_at:
            save_checkpoint(folder, wrapped.model, wrapped.optimizer, handle)
            at_checkpoint = wrapped.factors()
        losses.append(train_on(wrapped, batch))
    return Outcome(mean_over_ranks(losses)[saved_at:], at_checkpoint, wrapped.factors(), handle.state_dict())


def _resume(
    rank: int,
    world_size: int,
    engine_name: str,
    method: str,
    folder: str,
    saved_at: int = SAVED_AT,
    universal: bool = False,
) -> Outcome:
    """A fresh model and optimizer, loaded and trained to the end."""
    workload, wrapped = wrapped_workload(engine_name, world_size, universal, method)
    state = load_checkpoint(folder, wrapped.model, wrapped.optimizer)
    if hasattr(wrapped.model, "micro_steps"):
        wrapped.model.micro_steps = wrapped.model.global_steps  # DeepSpeed starts it anew; the harness compares
    handle = attach(wrapped.model, wrapped.optimizer, method_config(method), state_dict=state)
    at_checkpoint = wrapped.factors()
    losses = [train_on(wrapped, batch) for batch in workload.batches[saved_at:]]
    return Outcome(mean_over_ranks(losses), at_checkpoint, wrapped.factors(), handle.state_dict())


def _refusals(rank: int, world_size: int, engine_name: str, method: str, folder: str) -> list[str]:
    """What a run on this number of ranks is told, and one that wants a universal checkpoint before there is one."""
    attempts = (
        functools.partial(_resume, rank, world_size, engine_name, method, folder, SAVED_AT, u) for u in (False, True)
    )
    return [message_of(attempt) for attempt in attempts]


_CHOSEN_GRADIENT_METHODS = {("fsdp2", "scaled-gd"), ("zero2", "lora-pro"), ("fsdp2+tall", "lora-muon")}


def _engines_with_ranks() -> Iterator[Any]:
    """Every raw engine once; without the option a selection of different kinds, methods taking turns."""
    default = {"single", "ddp", "fsdp2-hsdp-shard1", "fsdp1-full", "zero2-two-groups", "zero3-subgroups", "zero1-bf16"}
    default |= {f"{name}+tall" for name in ("fsdp2", "fsdp1-flat", "zero2", "zero3")}
    for index, name in enumerate(OWN_LOOP):
        for turn, saved_at in enumerate((SAVED_AT, 1)):  # 1: at the end of the warm-up
            method = ("reflora", "reflora-s")[(index + turn) % 2]
            marks = [] if name in default and saved_at == SAVED_AT else [pytest.mark.all_ranks]
            world_sizes = ENGINES[name.partition("+")[0]].world_sizes
            world_size = world_sizes[index % len(world_sizes)]
            yield pytest.param(name, method, world_size, saved_at, marks=marks, id=f"{name}-{method}-after{saved_at}")
    default = {"zero2-two-groups", "zero3-subgroups", "fsdp2+tall"}
    for index, name in enumerate(OWN_LOOP):
        world_sizes = ENGINES[name.partition("+")[0]].world_sizes
        world_size = world_sizes[(index + 1) % len(world_sizes)]
        own_optimizers = [] if "cpu-adam" in name else ["lora-rite", "lora-muon"]
        methods = ["scaled-gd", "lora-pro", *own_optimizers, *(["balora"] if name in default else [])]
        for method in methods:
            chosen = name in default if method == "lora-rite" else (name, method) in _CHOSEN_GRADIENT_METHODS
            marks = [] if chosen else [pytest.mark.all_ranks]
            yield pytest.param(name, method, world_size, SAVED_AT, marks=marks, id=f"{name}-{method}-after{SAVED_AT}")


@pytest.mark.parametrize(("engine_name", "method", "world_size", "saved_at"), _engines_with_ranks())
def test_resumed_training_continues_as_if_uninterrupted(
    engine_name: str, method: str, world_size: int, saved_at: int, tmp_path: Path
) -> None:
    """Losses, factors and schedule of a resumed run are those of the uninterrupted one on every rank, bit by bit
    where the engine itself is deterministic; the adapter in the checkpoint equals the gathered factors exactly,
    and no file holds the frozen base.
    """
    rebuckets = engine_name.startswith(("ddp", "zero1", "zero2"))
    tolerance = REBUCKETED_TOLERANCE if rebuckets else 0.0
    if "bf16" in engine_name:
        tolerance = BF16_TOLERANCE
    folder = str(tmp_path / "checkpoint")
    complete = run_ranks(_train_and_save, world_size, engine_name, method, folder, saved_at)
    _assert_adapter_equals(tmp_path / "checkpoint", complete[0].at_checkpoint)
    assert_no_frozen_base(tmp_path / "checkpoint")
    for expected, resumed in zip(
        complete, run_ranks(_resume, world_size, engine_name, method, folder, saved_at), strict=True
    ):
        assert resumed.handle == expected.handle
        assert worst_factor_error(resumed.at_checkpoint, as_float(expected.at_checkpoint)) == 0.0
        assert worst_loss_error(resumed.losses, expected.losses) <= tolerance
        assert worst_factor_error(resumed.factors, as_float(expected.factors)) <= tolerance


def _assert_adapter_equals(folder: Path, factors: Factors) -> None:
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in factors}
    for name, factor in factors.items():
        assert torch.equal(saved[name.replace(".default", "")], factor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_for_the_base_finds_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """`assert_no_frozen_base` fails on a file that holds one frozen weight: its passing elsewhere means something."""
    weights = synthetic_workload(steps=1).base_weights
    torch.save({"x": weights["lm_head.weight"].to(dtype)}, tmp_path / "state.pt")
    with pytest.raises(AssertionError, match="lm_head"):
        assert_no_frozen_base(tmp_path)


def _other_numbers_of_ranks() -> Iterator[Any]:
    default = {("fsdp2+tall", 2, 3), ("zero2+tall", 2, 3)}
    tall = [f"{name}+tall" for name in ("fsdp2", *ZERO)]
    for name in ("fsdp2", "fsdp2-offload", "ddp", *ZERO, *tall):
        for index, (before, after) in enumerate(((2, 3), (4, 2))):
            marks = [] if (name, before, after) in default else [pytest.mark.all_ranks]
            method = ("reflora", "reflora-s")[index]
            yield pytest.param(name, method, before, after, marks=marks, id=f"{name}-{method}-{before}to{after}")
    # a tall shard of lora_A holds its part of the second moment elsewhere than a flat one
    default = {("fsdp2-shard1", 4, 2), ("zero3", 2, 3), ("fsdp2+tall", 2, 3)}
    for name in ("fsdp2", "fsdp2-offload", "fsdp2-shard1", "ddp", *ZERO, *tall):
        for before, after in ((2, 4), (4, 2)) if name == "fsdp2-shard1" else ((2, 3), (4, 2)):
            marks = [] if (name, before, after) in default else [pytest.mark.all_ranks]
            yield pytest.param(name, "lora-rite", before, after, marks=marks, id=f"{name}-lora-rite-{before}to{after}")


@pytest.mark.parametrize(("engine_name", "method", "before", "after"), _other_numbers_of_ranks())
def test_training_resumes_on_another_number_of_ranks(
    engine_name: str, method: str, before: int, after: int, tmp_path: Path
) -> None:
    """FSDP2 and DDP load as it is; DeepSpeed refuses and names the conversion, after which it loads too.

    The factors loaded are exactly those saved, and training goes on to the end of the uninterrupted run.
    """
    folder = str(tmp_path / "checkpoint")
    expected = run_ranks(_train_and_save, before, engine_name, method, folder)[0]
    universal = engine_name.partition("+")[0] in ZERO
    if universal:
        for plain, converted in run_ranks(_refusals, after, engine_name, method, folder):
            assert re.search(rf"written by {before} ranks .*ds_to_universal .*load_universal", plain), plain
            assert "holds no universal checkpoint" in converted
        convert_to_universal(tmp_path / "checkpoint")
        assert_no_frozen_base(tmp_path / "checkpoint")
    resumed = run_ranks(_resume, after, engine_name, method, folder, SAVED_AT, universal)
    tolerance = BF16_TOLERANCE if "bf16" in engine_name else OTHER_RANKS_TOLERANCE
    for outcome in resumed:
        assert worst_factor_error(outcome.at_checkpoint, as_float(expected.at_checkpoint)) == 0.0
        assert worst_factor_error(outcome.factors, as_float(expected.factors)) <= tolerance
        assert worst_loss_error(outcome.losses, expected.losses) <= tolerance
        assert outcome.handle == expected.handle


def test_round_robin_runs_are_not_resumed_from_universal_checkpoints(tmp_path: Path) -> None:
    """DeepSpeed would mix up their parameters, in converting and in loading: the error says what else to do.

    The run is recognized by its configuration, and where DeepSpeed was given a file by the order of the parameters.
    """
    robin, plain = tmp_path / "robin", tmp_path / "plain"
    for engine_name, folder in (("zero2-round-robin", robin), ("zero2", plain)):
        run_ranks(_train_and_save, 2, engine_name, "reflora", str(folder))
        assert was_round_robin(folder / "state") == (folder == robin)
        path = shutil.copytree(folder / "state", tmp_path / engine_name) / "mp_rank_00_model_states.pt"
        torch.save({**torch.load(path, weights_only=False), "ds_config": "deepspeed.json"}, path)
        assert was_round_robin(path.parent) == (folder == robin)
    with pytest.raises(RuntimeError, match=r"written by 2 ranks .* round_robin_gradients: use 2 ranks"):
        run_ranks(_resume, 3, "zero2-round-robin", "reflora", str(robin))
    convert_to_universal(robin)
    expected = rf"{robin}/state_universal was converted from .* resume from {robin}/state, .* use 2 ranks and take load"
    with pytest.raises(RuntimeError, match=expected):
        run_ranks(_resume, 2, "zero2", "reflora", str(robin), SAVED_AT, True)
    (plain / "state_universal" / "zero").mkdir(parents=True)  # refused before it is read
    shutil.copy(plain / "state" / "mp_rank_00_model_states.pt", plain / "state_universal")
    with pytest.raises(RuntimeError, match=rf"parameters of {plain}/state_universal .* take round_robin_gradients out"):
        run_ranks(_resume, 2, "zero2-round-robin", "reflora", str(plain), SAVED_AT, True)


# --- what is refused ---


@pytest.fixture(scope="module")
def ddp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp") / "checkpoint"
    run_ranks(_train_and_save, 2, "ddp", "reflora", str(folder))
    return folder


def _without_record(folder: Path) -> None:
    (folder / "reflora.json").unlink()


def _half_record(folder: Path) -> None:
    text = (folder / "reflora.json").read_text()
    (folder / "reflora.json").write_text(text[: len(text) // 2])


def _without_file(folder: Path) -> None:
    next((folder / "state").glob("*.distcp")).unlink()


def _half_file(folder: Path) -> None:
    file = next((folder / "state").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])


def _other_version(folder: Path) -> None:
    record = json.loads((folder / "reflora.json").read_text())
    (folder / "reflora.json").write_text(json.dumps({**record, "version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_record, "no complete checkpoint: reflora.json"),
        (_half_record, "reflora.json cannot be read"),
        (_without_file, "distcp is missing"),
        (_half_file, "has 1000 bytes instead of"),
        (_other_version, "version=99"),
    ],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank(
    damage: Any, message: str, ddp_checkpoint: Path, tmp_path: Path
) -> None:
    """A save that was killed, a lost and a truncated file each end in an error that names the file, not in a hang."""
    folder = shutil.copytree(ddp_checkpoint, tmp_path / "checkpoint")
    damage(folder)
    assert [message in text for text in run_ranks(_error_of_loading, 2, "ddp", str(folder))] == [True, True]


def test_another_engine_is_refused(ddp_checkpoint: Path) -> None:
    """The error names both engines; one process counts as DDP, since both hold everything whole."""
    for text in run_ranks(_error_of_loading, 2, "fsdp2", str(ddp_checkpoint)):
        assert "written under ddp and this is fsdp2" in text
    outcome = run_ranks(_resume, 1, "single", "reflora", str(ddp_checkpoint))[0]
    assert outcome.handle["steps"] == STEPS


def test_fsdp1_refuses_another_number_of_ranks(tmp_path: Path) -> None:
    """FSDP1 cannot redistribute its flat parameters; the error says so and what to do."""
    folder = str(tmp_path / "checkpoint")
    run_ranks(_train_and_save, 2, "fsdp1-full", "reflora", folder)
    for text in run_ranks(_error_of_loading, 3, "fsdp1-full", folder):
        assert "written by 2 ranks and this run has 3, which fsdp1 cannot load: use 2 ranks" in text


def _error_of_loading(rank: int, world_size: int, engine_name: str, folder: str) -> str:
    _, wrapped = wrapped_workload(engine_name, world_size)
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)) as caught:
        load_checkpoint(folder, wrapped.model, wrapped.optimizer)
    return str(caught.value)


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """Rank 0's error reaches the ranks that write nothing; they would wait for it in the next collective."""
    (tmp_path / "file").write_text("")
    texts = run_ranks(_error_of_saving, 2, "fsdp2", str(tmp_path / "file" / "folder"))
    assert "Not a directory" in texts[0]
    assert "failed on rank 0: NotADirectoryError" in texts[1]


def _error_of_saving(rank: int, world_size: int, engine_name: str, folder: str) -> str:
    _, wrapped = wrapped_workload(engine_name, world_size)
    with pytest.raises((OSError, RuntimeError)) as caught:
        save_adapter(wrapped.model, folder)
    return str(caught.value)


# --- killed ---


@pytest.mark.parametrize("engine_name", ["zero3", "fsdp2"])
def test_a_killed_run_resumes_from_its_last_complete_checkpoint(engine_name: str, tmp_path: Path) -> None:
    """All ranks are ended by SIGKILL within a step, the second save half done; a new launch takes the first
    checkpoint, refuses the half one and ends bit-equal to the run that was not killed.
    """
    folder = str(tmp_path / "complete")
    expected = run_ranks(_train_and_save, 2, engine_name, "reflora", folder)
    with pytest.raises(RuntimeError, match="exit codes"):
        run_ranks(_train_until_killed, 2, engine_name, str(tmp_path))
    assert not (tmp_path / "step4" / "reflora.json").exists()
    for text in run_ranks(_error_of_loading, 2, engine_name, str(tmp_path / "step4")):
        assert "no complete checkpoint" in text
    for resumed, outcome in zip(
        run_ranks(_resume, 2, engine_name, "reflora", str(tmp_path / "step3")), expected, strict=True
    ):
        assert resumed.losses == outcome.losses
        assert worst_factor_error(resumed.factors, outcome.factors) == 0.0


def _train_until_killed(rank: int, world_size: int, engine_name: str, folder: str) -> None:
    import reflora_dist.checkpoints.training_state as checkpoint

    workload, wrapped = wrapped_workload(engine_name, world_size)
    handle = attach(wrapped.model, wrapped.optimizer, method_config("reflora"))
    for step, batch in enumerate(workload.batches):
        if step == SAVED_AT:
            save_checkpoint(f"{folder}/step{step}", wrapped.model, wrapped.optimizer, handle)
        if step == SAVED_AT + 1:
            checkpoint.write_record = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
            save_checkpoint(f"{folder}/step{step}", wrapped.model, wrapped.optimizer, handle)
            os.kill(os.getpid(), signal.SIGKILL)
        train_on(wrapped, batch)
