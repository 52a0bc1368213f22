"""What the doctor predicts from files alone is what engines then hold and send."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from reflora_dist import RefLoRAConfig, attach, tall_adapters
from reflora_dist.doctor import DoctorOptions, diagnose
from reflora_dist.doctor.diagnosis import Diagnosis
from tests.support.cluster import run_ranks
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.zero import master_flats, zero_config
from tests.support.four_bit import quantized_model, save_base
from tests.support.workloads import Settings, build_model, is_factor, synthetic_workload, with_method

# engine, method, ranks, whether lora_A is stored tall; the first ones run by default, all of them with --all-ranks
CASES = [
    ("zero1", "reflora", 2, True),
    ("zero2", "reflora", 2, True),
    ("zero3", "reflora", 2, True),
    ("fsdp2", "reflora", 2, True),
    ("fsdp1-flat", "reflora", 2, True),
    ("ddp", "reflora", 2, False),
    ("zero1", "reflora", 2, False),
    ("zero2", "reflora", 2, False),
    ("zero3", "reflora", 2, False),
    ("fsdp1-flat", "reflora", 2, False),
    ("fsdp2", "lora-pro", 3, False),  # 8 rows on 3 ranks, which FSDP2 pads to 9
    ("zero3", "lora-pro", 3, True),  # cuts rows
    ("fsdp2", "reflora", 2, False),
    ("zero3-bf16-masters", "reflora", 2, True),
    ("zero3", "lora-rite", 3, True),
    ("zero3", "lora-muon", 3, True),
    ("zero3", "lora-rite", 3, False),
    ("zero2", "lora-pro", 3, True),
    ("zero2", "lora-pro", 3, False),
    ("fsdp2", "lora-rite", 3, True),
    ("fsdp2", "lora-rite", 3, False),
    ("fsdp2", "reflora-s", 4, True),
    ("zero3", "balora", 3, True),
    ("fsdp2", "balora", 3, False),
    ("fsdp2-hsdp", "reflora", 4, True),
    ("fsdp2-hsdp", "reflora", 4, False),
    ("zero2-round-robin", "reflora", 4, True),
    ("zero2-round-robin", "reflora", 4, False),
    ("zero3-persist-all", "scaled-gd", 4, True),
    ("zero3-persist-none", "lora-pro", 3, False),
    ("zero1-bf16", "reflora", 3, True),
    ("zero2-offload-cpu-adam", "reflora", 2, True),
    ("fsdp1-trainer", "reflora", 3, True),
    ("fsdp1-trainer", "reflora", 3, False),
    ("fsdp2-trainer", "reflora", 3, True),
    ("zero3-trainer", "reflora", 3, True),
    ("zero3-trainer", "reflora", 3, False),
]
DEFAULT = CASES[:12]
ZERO_OPTIONS: dict[str, dict[str, Any]] = {
    "zero2-round-robin": {"round_robin_gradients": True},
    "zero3-persist-all": {"stage3_param_persistence_threshold": 1_000_000},
    "zero3-persist-none": {"stage3_param_persistence_threshold": 0},
    "zero2-offload-cpu-adam": {"offload_optimizer": {"device": "cpu"}},
}
TOP_LEVEL: dict[str, dict[str, Any]] = {
    "zero3-bf16-masters": {"bf16": {"enabled": True}},
    "zero1-bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


def nbytes(tensors: Any) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def _storage(parameter: torch.Tensor) -> int:
    """Bytes that a parameter takes on this rank; FSDP2 pads shards, and ZeRO-3 pieces."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().untyped_storage().nbytes()
    piece = getattr(parameter, "ds_tensor", None)
    return nbytes([parameter if piece is None else piece])


def held(model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes that this rank's engine holds, by the names that the doctor has for them."""
    while not isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "param_groups"):
        optimizer = optimizer.optimizer
    units = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel) and m._handle is not None]
    if units:
        flats = [unit._handle.flat_param for unit in units]
        base, factors = nbytes(f for f in flats if not f.requires_grad), nbytes(f for f in flats if f.requires_grad)
    else:
        named = list(model.named_parameters())
        base = sum(_storage(p) for n, p in named if not is_factor(n))
        factors = sum(_storage(p) for n, p in named if is_factor(n))
    zero = next((o for o in _chain(optimizer) if type(o).__module__.startswith("deepspeed.")), None)
    if zero is not None and isinstance(zero, torch.optim.Optimizer):
        zero = None
    innermost = list(_chain(optimizer))[-1]
    moments = nbytes(v for s in innermost.state.values() for v in s.values() if torch.is_tensor(v) and v.dim())
    result = {"base weights": base, "optimizer's moments": moments}
    scales = sum(_scale_bytes(module.quant_state) for module in model.modules() if hasattr(module, "quant_state"))
    if scales:
        result["4-bit weights' scales, on every rank"] = scales
    if zero is None:
        return {**result, "factors": factors}
    # what the harness gathered last for its own use is partitioned again, so not p.numel()
    whole = sum(p.ds_numel * p.element_size() for p in model.parameters() if getattr(p, "ds_persist", False))
    flats = getattr(zero, "bit16_groups_flat", None) or getattr(zero, "bf16_groups_flat", None)
    factors = nbytes(flats) if flats else factors
    more = {"parameters kept whole": whole} if whole else {}
    return {**result, **more, "factors, working copy": factors, "factors, fp32 masters": nbytes(master_flats(zero))}


def _scale_bytes(state: Any) -> int:
    """What bitsandbytes keeps of a weight beside the packed elements."""
    nested = state.state2
    return nbytes([state.absmax, state.code, state.offset, nested.absmax, nested.code])


def _chain(optimizer: Any) -> Any:
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


class _EngineTraffic(TorchDispatchMode):
    """Bytes that this rank sends, by kind, from the first update to the second; reductions by the rule of a ring."""

    KINDS: ClassVar = {
        "_allgather_base_": "all_gather",
        "allgather_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "allreduce_": "all_reduce",
        "alltoall_base_": "all_to_all",
        "send": "send_recv",
    }

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.updates = 0

    def after_update(self, *_: Any) -> None:
        self.updates += 1
        if self.updates == 1:
            self.__enter__()
        else:
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._schema.name.split("::")[1]) in self.KINDS:
            kind, ranks = self.KINDS[name], dist.get_world_size()
            if kind == "all_to_all":
                _, sent, _, _, counts, *_ = args
                self.sent[kind] += (sent.numel() - counts[dist.get_rank() % len(counts)]) * sent.element_size()
                return func(*args, **(kwargs or {}))
            if kind == "send_recv":
                self.sent[kind] += nbytes(args[0])
                return func(*args, **(kwargs or {}))
            whole = max(nbytes([leaf]) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            whole *= ranks if name == "allgather_" else 1  # which lists the pieces
            self.sent[kind] += (2 if kind == "all_reduce" else 1) * (ranks - 1) * whole // ranks
        return func(*args, **(kwargs or {}))


def _train(
    rank: int, world_size: int, engine_name: str, method: str, tall: bool, base: Path | None = None
) -> dict[str, Any]:
    """Two steps; then what the handle reports and what is held. With the base in 4 bits if there is a folder of it."""
    engine = ENGINES[engine_name]
    workload = synthetic_workload(steps=2)
    got: dict[str, Any] = {}
    traffic = _EngineTraffic()

    def attached(model: Any, optimizer: Any) -> Any:
        config = RefLoRAConfig(method=method, warmup_steps=0)
        got.update(model=model, optimizer=optimizer, handle=attach(model, optimizer, config))
        got["handle"]._engine.optimizer.register_step_post_hook(traffic.after_update)
        return got["handle"]

    from reflora_dist import RefLoRACallback

    class Callback(RefLoRACallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)
            got.update(model=kwargs["model"], optimizer=kwargs["optimizer"], handle=self.handle)

    # which by itself stores them tall
    callback = Callback(RefLoRAConfig(method=method, warmup_steps=0), tall=None if tall else False)
    hook = callback if engine.takes_callback else attached
    settings = with_method(workload.settings, method)
    model = build_model(workload, dtype=engine.model_dtype) if base is None else quantized_model(workload, base)
    if tall and not engine.takes_callback:
        tall_adapters(model)
    engine.train(model, workload.batches, settings, hook)
    return {
        "report": got["handle"].report().as_dict(),
        "layouts": got["handle"]._engine.layouts(),
        "held": held(got["model"], got["optimizer"]),
        "sent": traffic.sent,
    }


def predicted(
    folder: Path, engine_name: str, method: str, world_size: int, tall: bool, load_in_4bit: bool = False
) -> Diagnosis:
    """The doctor's answer to a configuration file that says what the engine under test was built with."""
    LlamaConfig(**synthetic_workload(steps=1).llama, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    options = DoctorOptions(model=str(folder), method=method, lora_r=8, world_size=world_size, sequence_length=16)
    options.load_in_4bit = load_in_4bit
    options.tall_adapters = tall
    if engine_name.startswith("zero"):
        config = zero_config(Settings(), 12 // world_size, int(engine_name[4]), **ZERO_OPTIONS.get(engine_name, {}))
        path = folder / "deepspeed.json"
        path.write_text(json.dumps({**config, **TOP_LEVEL.get(engine_name, {})}))
        return diagnose([str(path)], options)
    options.mixed_precision = "no"
    if engine_name == "ddp":
        return diagnose([], options)
    content: dict[str, Any] = {
        "distributed_type": "FSDP",
        "num_processes": world_size,
        "mixed_precision": "no",
        "fsdp_config": {
            "fsdp_version": int(engine_name[4]),
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_use_orig_params": "flat" not in engine_name,
        },
    }
    if "hsdp" in engine_name:
        content["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": world_size // 2,
            "parallelism_config_dp_shard_size": 2,
        }
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(content))
    return diagnose([str(path)], options)


def _cases() -> list[Any]:
    further = [pytest.mark.all_ranks]
    return [
        pytest.param(
            *case,
            marks=[] if case in DEFAULT else further,
            id="-".join(map(str, (*case[:3], "tall" if case[3] else "flat"))),
        )
        for case in CASES
    ]


@pytest.mark.parametrize(("engine_name", "method", "world_size", "tall"), _cases())
def test_prediction_is_what_happens(engine_name: str, method: str, world_size: int, tall: bool, tmp_path: Path) -> None:
    """Engine, layouts, pairs, collectives and every rank's bytes are those of the run's report; sizes those held."""
    diagnosis = predicted(tmp_path, engine_name, method, world_size, tall)
    assert not diagnosis.findings.failed, diagnosis.findings
    ranks = run_ranks(_train, world_size, engine_name, method, tall)
    _check_reports(diagnosis, ranks)
    _check_sizes(diagnosis, ranks)
    if (engine_name, method, world_size, tall) in DEFAULT:
        _check_engine_traffic(diagnosis, ranks[0]["sent"])


@pytest.mark.parametrize(
    "engine_name",
    [
        "ddp",
        "fsdp2",
        *(pytest.param(name, marks=pytest.mark.all_ranks) for name in ("zero1", "zero2", "zero3", "fsdp1-trainer")),
    ],
)
def test_a_4_bit_base_is_sized_as_it_is_held(engine_name: str, tmp_path: Path) -> None:
    """And so is what goes over the wire."""
    tall = engine_name != "ddp"  # there nobody stores them so
    diagnosis = predicted(tmp_path, engine_name, "reflora", 2, tall, load_in_4bit=True)
    assert not diagnosis.findings.failed, diagnosis.findings
    save_base(synthetic_workload(steps=1), tmp_path / "base")
    ranks = run_ranks(_train, 2, engine_name, "reflora", tall, tmp_path / "base")
    _check_reports(diagnosis, ranks)
    _check_sizes(diagnosis, ranks)
    if not engine_name.endswith("trainer"):  # whose traffic nobody counts
        _check_engine_traffic(diagnosis, ranks[0]["sent"])


def _check_reports(diagnosis: Diagnosis, ranks: list[Any]) -> None:
    assert diagnosis.setup and diagnosis.traffic and diagnosis.pairs
    assert diagnosis.sent_bytes == max(outcome["report"]["bytes_per_step"] for outcome in ranks)
    for rank, outcome in enumerate(ranks):
        report, of_copy = outcome["report"], rank % diagnosis.setup.shard_size
        assert (diagnosis.setup.engine, diagnosis.layout) == (report["engine"], report["layout"])
        assert diagnosis.layouts == ([] if diagnosis.setup.whole else outcome["layouts"])
        assert sum(row["pairs"] for row in diagnosis.pairs) == report["num_pairs"]
        collectives = dict(diagnosis.traffic.collectives)
        if not any(diagnosis.traffic.exchanged(of_copy)):
            collectives.pop("send_recv", None)  # which has no cut row
        assert collectives == report["collectives_per_step"]
        assert diagnosis.traffic.sent(of_copy) == report["bytes_per_step"]


def _check_sizes(diagnosis: Diagnosis, ranks: list[Any]) -> None:
    assert diagnosis.memory
    counted = {item.name: item.bytes for item in diagnosis.memory if item.counted}
    most = {name: max(outcome["held"][name] for outcome in ranks) for name in ranks[0]["held"]}
    assert counted == most


def _check_engine_traffic(diagnosis: Diagnosis, sent: Counter[str]) -> None:
    """What went over the wire between two updates is the engine's and the method's; a norm and flags come on top."""
    assert diagnosis.traffic and diagnosis.setup
    ranks = diagnosis.setup.shard_size
    expected = Counter(all_reduce=2 * (ranks - 1) * diagnosis.traffic.reduced // ranks)
    if exchanged := sum(diagnosis.traffic.exchanged(0)):
        expected["send_recv" if diagnosis.traffic.neighbours else "all_to_all"] += exchanged
    for entry in diagnosis.engine_sends or ():
        expected[entry.collective] += entry.bytes
    assert expected.keys() >= sent.keys()
    for kind, expected_bytes in expected.items():
        assert 0 <= sent[kind] - expected_bytes <= 16, (kind, sent, expected)
