"""On PYTHONPATH of a launched job it makes one of its ranks fail, as REFLORA_TEST_FAULT says: "KIND RANK STEP".

Python imports a module of this name before anything else, so the job runs the scripts that are shipped, unchanged.

    kill   SIGKILL between the forward and the backward of that step
    raise  an exception there
    full   the file system of the folder REFLORA_TEST_DISK is full from that step on; without one, no file of that
           rank's checkpoints can have more than 2000 bytes (RLIMIT_FSIZE)
    hang   the rank sleeps there
    slow   every rank's steps take half a second
"""

import functools
import os
import sys


def _install(kind: str, rank: int, step: int) -> None:
    import signal
    import time

    from transformers import Trainer

    compute_loss = Trainer.compute_loss

    def faulty(trainer, *args, **kwargs):
        loss = compute_loss(trainer, *args, **kwargs)
        if kind == "slow":
            time.sleep(0.5)
        if kind == "slow" or not trainer.model.training:
            return loss
        if trainer.args.process_index == rank and trainer.state.global_step == step - 1:
            with open(os.environ["REFLORA_TEST_STAMP"], "w") as stamp:
                stamp.write(str(time.time()))
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "hang":
                time.sleep(600)
            if kind == "raise":
                raise RuntimeError("out of memory (a test's)")
            if kind == "full" and "REFLORA_TEST_DISK" in os.environ:
                _fill(os.environ["REFLORA_TEST_DISK"])
            elif kind == "full":
                trainer._save_checkpoint = functools.partial(_save_small_files, trainer._save_checkpoint)
        return loss

    Trainer.compute_loss = faulty


def _fill(folder: str) -> None:
    with open(os.path.join(folder, "ballast"), "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            ballast.truncate(os.path.getsize(ballast.name) - 3 * 4096)  # some of the checkpoint's files fit


def _save_small_files(save, *args, **kwargs):
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        save(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if "RANK" in os.environ and os.environ.get("REFLORA_TEST_FAULT") and sys.argv[0] != "-c":
    _kind, _rank, _step = os.environ["REFLORA_TEST_FAULT"].split()
    _install(_kind, int(_rank), int(_step))
