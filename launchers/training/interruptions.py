"""Stop with a checkpoint after a scheduler's signal: SIGTERM, or SIGUSR1 as an earlier warning.

A signal may reach only one rank, and ranks may be at different steps. The rank that gets it at step s writes s + 2 into
the job's store as the last step. Every rank reads the store at the end of every step. No rank can end step s + 2 before
the writer has begun step s + 1, and the writer begins that step after writing. On a GPU this holds because Trainer
reads the loss of every step. With ``logging_nan_inf_filter=False`` a rank may run ahead, and then raises an error.

transformers' own ``enable_jit_checkpoint`` lets each rank decide alone, and ranks that disagree wait for each other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback

from ..screen.lines import show, show_last

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# torchrun, deepspeed and SLURM follow SIGTERM with SIGKILL after 30 s
GRACE_SECONDS = 25.0
_STEPS_AHEAD = 2
_STOP_KEY = "launchers/stop_after_step"
_TIME_KEY = "launchers/time_of_sigterm"


class StopOnSignal(TrainerCallback):
    """End training with a checkpoint after the same step on every rank, once any rank got SIGTERM or SIGUSR1.

    The signal handlers are installed while training runs, in the main thread of the process. After SIGTERM a rank ends
    itself if it cannot reach that step in time, because another rank is gone or a step takes too long.

    Attributes:
        stopped_by: the signal; None if training was not stopped.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._step = 0
        self._saves_model_only = False
        self._stop_reached = threading.Event()
        self._restore = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves_model_only = args.save_only_model
        # a Python handler runs only after the main thread has left a collective; a byte in a socket arrives at once
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._restore.callback(receiver.close)
        self._restore.callback(sender.close)
        self._restore.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False))
        for number in SIGNALS:
            self._restore.callback(signal.signal, number, signal.signal(number, _leave_to_the_thread))
        threading.Thread(target=self._watch, args=(receiver,), daemon=True).start()
        _shield_workers(kwargs["train_dataloader"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop_after = self._agreed_step(state.global_step)
        if stop_after is None or state.global_step < stop_after[0]:
            return
        if state.global_step > stop_after[0]:
            raise RuntimeError(f"step {state.global_step} is past {stop_after[0]}, where the other ranks stop")
        self.stopped_by = signal.Signals(stop_after[1])
        self._step = state.global_step
        self._stop_reached.set()
        control.should_save = control.should_training_stop = True
        # Trainer would evaluate first: that takes time, and with --save_strategy best it decides about the checkpoint
        control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped_by is not None:  # Trainer ends the epoch, too, and the checkpoint is written already
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def exit_code(self) -> int:
        """Return 0, or after a signal 128 plus its number, as shells do. The first rank prints how to resume."""
        if self.stopped_by is None:
            return 0
        if not dist.is_initialized() or dist.get_rank() == 0:
            stopped = f"stopped by {self.stopped_by.name} after step {self._step}"
            further = "--resume_from_checkpoint auto goes on"
            if self._saves_model_only:
                further = "its checkpoint has no optimizer state (--save_only_model): --model CHECKPOINT starts from it"
            show_last(_line(f"{stopped}; {further}"))
        return 128 + self.stopped_by

    def close(self) -> None:
        """Restore the former signal handlers."""
        self._stop_reached.set()
        self._restore.close()

    def _agreed_step(self, step: int) -> tuple[int, int] | None:
        """Return the step to stop after and the signal's number, or None.

        Communication: one small request to the store, about 0.1 ms.
        """
        own = self._received
        if not _several_ranks():
            return (step, own) if own is not None else None
        store = _get_default_store()
        if own is not None:
            # the first to write wins
            store.compare_set(_STOP_KEY, "", f"{step + _STEPS_AHEAD} {own.value}")
        if not store.check([_STOP_KEY]):
            return None
        stop_after, number = store.get(_STOP_KEY).split()
        return int(stop_after), int(number)

    def _watch(self, receiver: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the socket was closed
            while numbers := receiver.recv(64):
                for number in numbers:
                    if number not in SIGNALS or self._stop_reached.is_set():
                        continue
                    if self._received is None:
                        self._received = signal.Signals(number)
                        _say(f"{self._received.name}: a checkpoint follows, then this run ends")
                    if number == signal.SIGTERM and _several_ranks():
                        self._end_in_time()

    def _end_in_time(self) -> None:
        # deepspeed's launcher signals each rank only after the one before has ended
        try:
            first = float(_get_default_store().compare_set(_TIME_KEY, "", str(time.time())))
        except RuntimeError:  # the process that held the store is gone
            first = 0.0
        if not self._stop_reached.wait(max(0.0, first + GRACE_SECONDS - time.time())):
            _say(
                f"no checkpoint {GRACE_SECONDS:g} s after SIGTERM: another rank is gone, or steps are too long "
                "(have the scheduler send SIGUSR1 earlier); the last complete checkpoint stands"
            )
            os._exit(128 + signal.SIGTERM)


def _leave_to_the_thread(number: int, frame: Any) -> None:
    pass


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _say(text: str) -> None:
    show(_line(text))


def _line(text: str) -> str:
    return f"finetune.py: rank {dist.get_rank() if dist.is_initialized() else 0}: {text}"


def _shield_workers(dataloader: Any) -> None:
    """Make the data loader's workers ignore SIGTERM. Schedulers signal them too, and their end would be an error.

    Workers end with their parent. Workers of evaluations are not covered, because Trainer makes them anew each time;
    nor are those under Ulysses, whose loader has started them before.
    """
    loader = getattr(dataloader, "base_dataloader", dataloader)
    if getattr(loader, "num_workers", 0):
        loader.worker_init_fn = _IgnoringSigterm(loader.worker_init_fn)


class _IgnoringSigterm:
    def __init__(self, init: Any) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.init is not None:
            self.init(worker)
