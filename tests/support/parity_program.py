"""What tests start through launchers: the reference's cases on an engine, one outcome per rank.

    torchrun ... tests/support/parity_program.py ENGINE FOLDER CASE...

ENGINE is a name of ``ENGINES``, or "as-launched": ZeRO-3 by the configuration of ``accelerate launch``. A case of the
form CASE:METHOD is trained with that method, as its oracle does; one that ends in ":tall" with lora_A stored tall.
With ``REFLORA_TEST_DEVICE=cuda`` on GPUs: over NCCL where each rank has one of its own, else over gloo.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from reflora_dist.algebra import kernels
from tests.support.engines_under_test import ENGINES, Engine
from tests.support.engines_under_test.accelerated import zero3_as_launched
from tests.support.engines_under_test.common import DEVICE
from tests.support.parity import Run, train_all

ENGINES["as-launched"] = Engine("as-launched", zero3_as_launched)


def main() -> None:
    engine, folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    backend, local_rank = "gloo", int(os.environ["LOCAL_RANK"])
    if DEVICE.type == "cuda":
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(local_rank % gpus)
        os.environ["LOCAL_RANK"] = str(local_rank % gpus)  # DeepSpeed takes it for the number of a GPU
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus:
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=5))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    runs = [_run(case) for case in cases]
    outcomes = train_all(rank, world_size, engine, runs)
    written = {
        "host": socket.gethostname(),
        "local_rank": local_rank,
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "world_size": world_size,
        "backend": backend,
        "kernels": DEVICE.type == "cuda" and kernels.usable(torch.device("cuda", torch.cuda.current_device())),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(written))
    # gloo's workers may abort if ranks leave at different times
    dist.barrier()
    dist.destroy_process_group()


def _run(case: str) -> Run:
    name, *others = case.split(":")
    return Run(name, method=next((other for other in others if other != "tall"), ""), tall="tall" in others)


if __name__ == "__main__":
    main()
