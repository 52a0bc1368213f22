"""On a GPU: the engines follow the single-process trajectories there too.

Several ranks share a GPU over gloo where there are fewer GPUs than ranks; with one each they use NCCL. The program runs
under torchrun: a process that was forked from one that has looked for GPUs could not use them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reflora_dist import kernels
from tests.engines_under_test import ENGINES
from tests.workloads import FACTOR_TOLERANCE, LOSS_TOLERANCE, needs_reference, reference_cases

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).resolve().parents[1]
# oracles of methods without a published trajectory
_METHODS = ("lora:scaled-gd", "lora:lora-pro")
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
}


def _combinations() -> Iterator[Any]:
    for engine, numbers in _RANKS.items():
        for number in numbers:
            yield pytest.param(engine, number, id=f"{engine}-{number}ranks")


def _run(command: list[str], variables: dict[str, str], log: Path) -> None:
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        code = process.wait(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        process.wait()
        code = -1
    assert code == 0, f"exit code {code}: {log.read_text(errors='replace')[-8000:]}"


@needs_reference
@pytest.mark.parametrize(("engine_name", "ranks"), _combinations())
def test_engine_follows_the_reference_on_a_gpu(engine_name: str, ranks: int, tmp_path: Path) -> None:
    cases = [*reference_cases(), *_METHODS]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(REPOSITORY / "tests" / "parity_program.py"), engine_name, str(tmp_path), *cases]
    variables = {
        **os.environ,
        "REFLORA_TEST_DEVICE": "cuda",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    variables.pop("DS_ACCELERATOR", None)
    _run(command, variables, tmp_path / "log")
    engine = ENGINES[engine_name]
    for rank in range(ranks):
        written = json.loads((tmp_path / f"{rank}.json").read_text())
        outcomes = written["outcomes"]
        assert written["backend"] == ("cpu:gloo,cuda:nccl" if ranks <= torch.cuda.device_count() else "gloo")
        # where the kernels are not for this GPU, plain code is what is tested; else they have not been put aside
        assert written["kernels"] == kernels.usable(torch.device("cuda", 0))
        assert len(outcomes) == len(cases)
        for outcome in outcomes:
            assert outcome["factor_error"] <= (engine.bf16_factor_tolerance or FACTOR_TOLERANCE), (rank, outcome)
            assert outcome["loss_error"] <= (engine.bf16_loss_tolerance or LOSS_TOLERANCE), (rank, outcome)
            # a comparison that holds for another method's end too would prove nothing
            assert outcome["label"].startswith("reflora") or outcome["distance_to_other"] > 1e-3, (rank, outcome)
