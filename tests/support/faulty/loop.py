"""A training loop of one's own, for torchrun: python loop.py ENGINE FOLDER KIND RANK STEP, of which KIND may be none.

It saves every second step over its last checkpoint and begins from it if there is one; the factors go to factors.pt.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from reflora_dist import RefLoRAConfig, attach
from reflora_dist.checkpoints.training_state import load_checkpoint, save_checkpoint
from reflora_dist.step import handle as integrate
from tests.support.engines_under_test import ENGINES
from tests.support.engines_under_test.common import Wrapped, train_on
from tests.support.faulty.sitecustomize import _save_small_files
from tests.support.workloads import build_model, synthetic_workload

SAVE_STEPS = 2


def main(engine_name: str, folder: Path, kind: str, faulty_rank: int, faulty_step: int) -> None:
    dist.init_process_group("gloo")
    faulty = dist.get_rank() == faulty_rank
    workload = synthetic_workload()
    engine = ENGINES[engine_name]
    model = build_model(workload, dtype=engine.model_dtype)
    settings = dataclasses.replace(workload.settings, clip=0.5)
    wrapped = engine.wrap(model, settings, workload.batches.shape[1] // dist.get_world_size())
    checkpoint = folder / "checkpoint"
    state = load_checkpoint(checkpoint, wrapped.model, wrapped.optimizer) if checkpoint.exists() else None
    if faulty and kind.startswith("attach"):
        integrate.Handle._rescale_before_first_step = lambda self: _fail(kind, folder)  # type: ignore[method-assign]
        integrate.find_engine = lambda *args: _fail(kind, folder)  # type: ignore[assignment]
    handle = attach(wrapped.model, wrapped.optimizer, RefLoRAConfig(warmup_steps=1), state_dict=state)
    done = handle.report().steps
    for step, batch in enumerate(workload.batches[done:], start=done + 1):
        if faulty and step == faulty_step and kind in ("kill", "raise"):
            _fail_in_backward(wrapped, kind, folder)
        train_on(wrapped, batch)
        if step % SAVE_STEPS == 0:
            if faulty and step == faulty_step and kind == "full":
                _stamp(folder)
                _save_small_files(save_checkpoint, checkpoint, wrapped.model, wrapped.optimizer, handle)
            save_checkpoint(checkpoint, wrapped.model, wrapped.optimizer, handle)
    factors = wrapped.factors()
    if dist.get_rank() == 0:
        torch.save(factors, folder / "factors.pt")
    dist.barrier()
    dist.destroy_process_group()


def _fail_in_backward(wrapped: Wrapped, kind: str, folder: Path) -> None:
    wrapped.backward = lambda loss: _fail(kind, folder)  # type: ignore[method-assign, assignment]


def _fail(kind: str, folder: Path) -> None:
    _stamp(folder)
    if kind.endswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    raise MemoryError("out of memory (a test's)")


def _stamp(folder: Path) -> None:
    Path(os.environ["REFLORA_TEST_STAMP"]).write_text(str(time.time()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
