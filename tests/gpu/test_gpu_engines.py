"""On a GPU: the engines follow the single-process trajectories there too.

Several ranks share a GPU over gloo where there are fewer GPUs than ranks; with one each they use NCCL. The program runs
under torchrun: a process that was forked from one that has looked for GPUs could not use them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reflora_dist.algebra import kernels
from tests.support.engines_under_test import ENGINES, WITHOUT_TALL
from tests.support.launched import launched
from tests.support.launchers import REPOSITORY
from tests.support.workloads import FACTOR_TOLERANCE, LOSS_TOLERANCE, reference_cases

pytestmark = pytest.mark.gpu
# oracles of methods without a published trajectory
_METHODS = ("lora:scaled-gd", "lora:lora-pro", "lora:balora")
_RANKS = {
    "ddp": (1, 2),
    "fsdp2": (1, 2, 3, 4),
    "fsdp2-shard1": (2,),
    "fsdp2-hsdp": (4,),
    "fsdp2-offload": (2,),
    "fsdp2-bf16": (2,),
    "fsdp1-full": (1, 2, 3),
    "fsdp1-flat": (2,),
    "zero1-bf16": (2,),
    "zero2": (1, 3),
    "zero3": (1, 2, 3, 4),
    "zero3-subgroups": (2,),
    "zero3-offload": (2,),
    "zero3-bf16-masters": (2,),
    "zero3-fp16": (2,),
    "fsdp1-accelerate": (2,),
    "fsdp2-accelerate": (2,),
    "fsdp2-trainer": (2,),
    "zero3-trainer": (2,),
    "fsdp2-sft": (1,),
    # torch's ring attention passes keys between GPUs; written, and not run yet
    **({"fsdp2-context-parallel": (2,)} if torch.cuda.device_count() > 1 else {}),
}

# in place of what keeps a job on the CPU
_ENVIRONMENT = {
    "REFLORA_TEST_DEVICE": "cuda",
    "DS_ACCELERATOR": "cuda",
    "PYTHONFAULTHANDLER": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def _combinations() -> Iterator[Any]:
    for engine, numbers in _RANKS.items():
        for number in numbers:
            yield pytest.param(engine, number, id=f"{engine}-{number}ranks")


@pytest.mark.parametrize(("engine_name", "ranks"), _combinations())
def test_engine_follows_the_reference_on_a_gpu(engine_name: str, ranks: int, tmp_path: Path) -> None:
    cases = [*reference_cases(), *_METHODS]
    if engine_name not in WITHOUT_TALL:
        cases += [f"{case}:tall" for case in cases]
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    command += [str(REPOSITORY / "tests" / "support" / "parity_program.py"), engine_name, str(tmp_path), *cases]
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    with launched(command, tmp_path, CUDA_VISIBLE_DEVICES=visible, **_ENVIRONMENT) as job:
        assert job.launcher.wait(timeout=400) == 0, job.output()[-8000:]
    engine = ENGINES[engine_name]
    for rank in range(ranks):
        written = json.loads((tmp_path / f"{rank}.json").read_text())
        outcomes = written["outcomes"]
        assert written["backend"] == ("cpu:gloo,cuda:nccl" if ranks <= gpus else "gloo")
        # where the kernels are not for this GPU, plain code is what is tested; else they have not been put aside
        assert written["kernels"] == kernels.usable(torch.device("cuda", 0))
        assert len(outcomes) == len(cases)
        for outcome in outcomes:
            assert outcome["factor_error"] <= (engine.bf16_factor_tolerance or FACTOR_TOLERANCE), (rank, outcome)
            assert outcome["loss_error"] <= (engine.bf16_loss_tolerance or LOSS_TOLERANCE), (rank, outcome)
            # a comparison that holds for another method's end too would prove nothing
            assert outcome["label"].startswith("reflora") or outcome["distance_to_other"] > 1e-3, (rank, outcome)
