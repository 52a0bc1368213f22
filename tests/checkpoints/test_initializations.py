"""Starts that change the base, as a training loop of one's own uses them: under every engine, saved and resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from reflora_dist import attach, export_adapter, initialize_adapters, replay_initialization
from reflora_dist.checkpoints.training_state import load_checkpoint, save_checkpoint
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import mean_over_ranks, train_on
from tests.support.engines_under_test.zero import zero_config
from tests.support.initializations import LOGIT_TOLERANCE, METHOD, STEPS, WORKLOAD, base_model, build_started, logits_of
from tests.support.workloads import Factors, worst_factor_error

INITS = ("kaiming_both", "pissa", "pissa_niter_4", "olora", "lora_ga")
BF16_LOGIT_TOLERANCE = 5e-2


class Run(NamedTuple):
    """What a rank saw."""

    initial: Factors
    start: Any  # reflora_dist.checkpoints.start_file.Start
    start_logits: Tensor
    losses: list[float]
    factors: Factors
    logits: Tensor


def _run(
    rank: int, world_size: int, engine_name: str, init: str, folder: str, resume: bool, export: bool = True
) -> Run:
    checkpoint = f"{folder}/checkpoint"
    wrapped, initial = build_started(engine_name, init, world_size, checkpoint if resume else None, rank)
    start = next(m for m in wrapped.model.modules() if isinstance(m, PeftModel))._reflora_start
    start_logits = logits_of(wrapped.model)
    state = load_checkpoint(checkpoint, wrapped.model, wrapped.optimizer) if resume else None
    if resume and hasattr(wrapped.model, "micro_steps"):
        wrapped.model.micro_steps = wrapped.model.global_steps  # DeepSpeed starts it anew; the harness compares
    handle = attach(wrapped.model, wrapped.optimizer, METHOD, state_dict=state)
    losses = []
    for step in range(STEPS // 2 if resume else 0, STEPS):
        losses.append(train_on(wrapped, WORKLOAD.batches[step]))
        if step + 1 == STEPS // 2:
            save_checkpoint(checkpoint, wrapped.model, wrapped.optimizer, handle)
    assert handle.report().skipped_pairs == 0
    factors, logits = wrapped.factors(), logits_of(wrapped.model)
    if export and not resume:
        export_adapter(wrapped.model, f"{folder}/adapter")
    return Run(initial, start, start_logits, mean_over_ranks(losses), factors, logits)


def _cases() -> Iterator[Any]:
    default = {
        ("single", "pissa", 1),
        ("ddp", "lora_ga", 2),
        ("zero3", "kaiming_both", 2),
        ("fsdp2", "pissa_niter_4", 2),
        ("fsdp1-full", "olora", 2),
        ("zero2", "kaiming_both", 2),
    }
    for engine in ("single", "ddp", "fsdp2", "fsdp1-full", "zero2", "zero3"):
        for init in INITS:
            for ranks in (1,) if engine == "single" else (2, 3):
                marks = [] if (engine, init, ranks) in default else [pytest.mark.all_ranks]
                yield pytest.param(engine, init, ranks, marks=marks, id=f"{engine}-{init}-{ranks}")


@pytest.mark.parametrize(("engine_name", "init", "world_size"), _cases())
def test_the_function_survives_start_resume_and_export(
    engine_name: str, init: str, world_size: int, tmp_path: Path
) -> None:
    """At the start the logits are the original base's and every rank has the same factors, though each has its own
    seed. Resumed in new processes, on the original base, losses, factors and logits are the whole run's. Plain PEFT
    computes the trained logits from the exported adapter and the original base.
    """
    expected = logits_of(base_model())
    whole = run_ranks(_run, world_size, engine_name, init, str(tmp_path), False)
    for run in whole:
        assert run.initial.keys() == whole[0].initial.keys() and run.start.mark == whole[0].start.mark
        assert all(torch.equal(factor, whole[0].initial[name]) for name, factor in run.initial.items())
        assert all(factor.abs().max() > 0 for factor in run.initial.values())
        assert (run.start_logits - expected).abs().max() < LOGIT_TOLERANCE
    resumed = run_ranks(_run, world_size, engine_name, init, str(tmp_path), True)
    # ZeRO-2 and DDP cut their first buckets differently, so that gradients are summed in another order, which RefLoRA
    # passes on; of two ranks DDP's sum has one order only
    reordered = engine_name == "zero2" or (engine_name == "ddp" and world_size > 2)
    tolerance = 1e-5 if reordered else 0.0
    for before, after in zip(whole, resumed, strict=True):
        assert after.start.after == before.start.after and after.start.mark == before.start.mark
        assert after.losses == pytest.approx(before.losses[STEPS // 2 :], rel=tolerance, abs=0)
        assert worst_factor_error(after.factors, before.factors) <= tolerance
        assert (after.logits - before.logits).abs().max() <= tolerance
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    assert (logits_of(loaded) - whole[0].logits).abs().max() < 4 * LOGIT_TOLERANCE
    assert (whole[0].logits - expected).abs().max() > 1e-2, "nothing was trained"


def test_every_engine_changes_the_base_to_the_same_bits(tmp_path: Path) -> None:
    """The same factors, however the base is cut: the changed weights' checksums, and the mark, are one process's.
    So a run that began under one engine continues on another number of ranks.
    """
    starts = [
        run_ranks(_run, ranks, name, "kaiming_both", str(tmp_path / f"{name}-{ranks}"), False, False)[0].start
        for name, ranks in (("single", 1), ("ddp", 2), ("fsdp2", 3), ("zero3", 2), ("zero3", 3))
    ]
    for start in starts[1:]:
        assert (start.before, start.after, start.mark) == (starts[0].before, starts[0].after, starts[0].mark)
    assert starts[0].before != starts[0].after


@pytest.mark.parametrize("world_size", [3, pytest.param(4, marks=pytest.mark.all_ranks)])
def test_a_run_resumes_on_another_number_of_ranks(world_size: int, tmp_path: Path) -> None:
    """FSDP2 loads a checkpoint of two ranks on three; the base is changed by the rows that each holds."""
    whole = run_ranks(_run, 2, "fsdp2", "kaiming_both", str(tmp_path), False)
    resumed = run_ranks(_run, world_size, "fsdp2", "kaiming_both", str(tmp_path), True)
    assert resumed[0].start.after == whole[0].start.after
    # sums over another number of ranks, through Adam
    assert resumed[0].losses == pytest.approx(whole[0].losses[STEPS // 2 :], rel=1e-5)
    assert worst_factor_error(resumed[0].factors, whole[0].factors) < 1e-4


@pytest.mark.parametrize(
    ("engine_name", "world_size"),
    [("single", 1), ("zero3-bf16-masters", 2), pytest.param("zero2-bf16-masters", 2, marks=pytest.mark.all_ranks)],
)
def test_a_bf16_base_is_rounded_alike_every_time(engine_name: str, world_size: int, tmp_path: Path) -> None:
    """``W - s B A`` is rounded to bf16, so the start differs from the base by rounding; resumed it differs alike."""
    name = "single-bf16" if engine_name == "single" else engine_name
    expected = logits_of(base_model(torch.bfloat16))
    whole = run_ranks(_run_bf16, world_size, name, str(tmp_path), False)
    resumed = run_ranks(_run_bf16, world_size, name, str(tmp_path), True)
    assert (whole[0].start_logits - expected).abs().max() < BF16_LOGIT_TOLERANCE
    assert set(whole[0].start.base_dtype.values()) == {"torch.bfloat16"}
    assert resumed[0].start.after == whole[0].start.after
    assert resumed[0].losses == pytest.approx(whole[0].losses[STEPS // 2 :], rel=2e-3)
    loaded = PeftModel.from_pretrained(base_model(torch.bfloat16), tmp_path / "adapter")
    assert (logits_of(loaded) - whole[0].logits).abs().max() < 2 * BF16_LOGIT_TOLERANCE


def _run_bf16(rank: int, world_size: int, engine_name: str, folder: str, resume: bool) -> Run:
    if engine_name == "single-bf16":
        import dataclasses

        ENGINES["single-bf16"] = dataclasses.replace(ENGINES["single"], model_dtype=torch.bfloat16)
    return _run(rank, world_size, engine_name, "kaiming_both", folder, resume)


# --- sharded already, and what is communicated ---


def _after_sharding(rank: int, world_size: int, kind: str, init: str) -> tuple[Tensor, str, Factors]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.nn.parallel import DistributedDataParallel

    if kind == "read by the first rank":  # which accelerate's configurations ask for
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    torch.manual_seed(100 + rank)
    model: Any = get_peft_model(base_model(), LoraConfig(**WORKLOAD.lora))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        dims = {"rows": 0, "columns": 1, "read by the first rank": 0}
        fully_shard(model, shard_placement_fn=lambda p: Shard(dims[kind] if p.ndim > 1 else 0))
    initialize_adapters(model, init)
    factors = {
        name.removeprefix("module."): p.full_tensor() if kind != "ddp" else p.detach()
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    return logits_of(model), next(m for m in model.modules() if isinstance(m, PeftModel))._reflora_start.mark, factors


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        ("rows", "kaiming_both"),
        ("rows", "pissa"),
        ("columns", "kaiming_both"),
        ("ddp", "olora"),
        ("read by the first rank", "kaiming_both"),
        ("read by the first rank", "pissa"),
    ],
)
def test_a_model_that_is_sharded_already(kind: str, init: str) -> None:
    """After ``fully_shard`` by rows or columns, or after DDP: the function stays, the start is that of one process."""
    ranks = run_ranks(_after_sharding, 2, kind, init)
    torch.manual_seed(100)
    alone = get_peft_model(base_model(), LoraConfig(**WORKLOAD.lora))
    initialize_adapters(alone, init)
    for logits, mark, factors in ranks:
        assert (logits - logits_of(base_model())).abs().max() < LOGIT_TOLERANCE
        assert mark == alone._reflora_start.mark
        for name, parameter in alone.named_parameters():
            if "lora_" in name:
                assert torch.equal(factors[name], parameter.detach())


def _gathered_sizes(rank: int, world_size: int, init: str, folder: str) -> list[list[int]]:
    """Sizes of what ZeRO-3 gathers while the start is made, and while it is replayed."""
    from deepspeed.runtime.zero import partition_parameters

    gathered: list[int] = []
    original = partition_parameters.GatheredParameters.__enter__

    def enter(self: Any) -> None:
        gathered.extend(p.ds_numel for p in getattr(self, "params", []))
        original(self)

    sizes = []
    for checkpoint in (None, folder):
        base = base_model()
        deepspeed.zero.Init(module=base, config_dict_or_path=zero_config(WORKLOAD.settings, 1, 3))
        model = get_peft_model(base, LoraConfig(**WORKLOAD.lora))
        gathered.clear()
        partition_parameters.GatheredParameters.__enter__ = enter
        if checkpoint is None:
            from reflora_dist.checkpoints.training_state import save_adapter

            initialize_adapters(model, init)
            sizes.append(list(gathered))
            save_adapter(model, folder)
        else:
            replay_initialization(model, checkpoint)
            sizes.append(list(gathered))
        partition_parameters.GatheredParameters.__enter__ = original
    return sizes


@pytest.mark.parametrize("init", ["kaiming_both", "olora"])
def test_no_base_weight_is_gathered_to_be_changed(init: str, tmp_path: Path) -> None:
    """Under ``zero.Init`` kaiming_both gathers nothing, OLoRA each weight once to decompose it, replaying nothing."""
    for start, replay in run_ranks(_gathered_sizes, 2, init, str(tmp_path)):
        assert len(start) == (0 if init == "kaiming_both" else 14)
        assert replay == []
