"""Wait for other processes, and say on stderr what is waited for and since when."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from reflora_dist.command_line.name import in_own_words

FIRST_WORD_SECONDS = 3.0
NEXT_WORD_SECONDS = 60.0
_YES = ("1", "ON", "YES", "TRUE")  # as the hub's client reads its variables, which would have to be imported
_LONGEST_PAUSE = 0.5  # between two looks
_open: list[threading.Event] = []
_meetings = itertools.count()


@contextlib.contextmanager
def told(what: str | Callable[[], str]) -> Iterator[None]:
    """Say on stderr what the code inside waits for, first after a few seconds and then every minute.

    If contexts are nested, only the innermost one speaks. An empty text is not printed.
    """
    since, done = time.strftime("%H:%M:%S"), threading.Event()

    def talk() -> None:
        pause = FIRST_WORD_SECONDS
        while not done.wait(pause):
            pause = NEXT_WORD_SECONDS
            text = what() if callable(what) else what
            if text and _open[-1:] == [done]:
                say(f"since {since} {text}")

    _open.append(done)
    threading.Thread(target=talk, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        _open.remove(done)


def stage(what: str, name: str | None = None) -> contextlib.AbstractContextManager[None]:
    """Say on stderr what the code inside does, as :func:`told`; on the first rank only, for all do the same.

    Args:
        what: the work, "loading the model".
        name: what it is done with, a local path or a name of the hub. The hub may take minutes to answer, so the line
            names its address.
    """
    if os.environ.get("RANK", "0") != "0":
        return contextlib.nullcontext()
    if name is None:
        return told(what)
    offline = any(
        os.environ.get(variable, "").upper() in _YES for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    if offline or Path(name).exists():
        return told(f"{what} {name}")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return told(f"{what} {name}, from {hub} or the cache (HF_HUB_OFFLINE=1: from the cache alone)")


def say(text: str) -> None:
    """Print one line on stderr, with the program and the rank."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(in_own_words(f"{Path(sys.argv[0]).name}: {rank}{text}"), file=sys.stderr, flush=True)


def wait_for_ranks(what: str) -> None:
    """Wait until every rank has called. While ranks are missing, the first rank that is present names them.

    A barrier must follow before ranks leave the process group, because one rank may hold the store that others still
    read. A collective would not do here: it ends after ``--ddp_timeout``, even if the missing ranks still work.

    Communication: small requests to the job's store, a few per second and rank.
    """
    import torch.distributed as dist  # shell scripts run modules that import this one, and torch takes seconds
    from torch.distributed.distributed_c10d import _get_default_store

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store, rank, ranks = _get_default_store(), dist.get_rank(), range(dist.get_world_size())
    key = f"launchers/meeting {next(_meetings)}"

    def missing() -> str:
        if next(other for other in ranks if store.check([f"{key}/{other}"])) != rank:
            return ""
        return f"waiting for rank {', '.join(str(r) for r in ranks if not store.check([f'{key}/{r}']))}: {what}"

    store.set(f"{key}/{rank}", "here")
    arrived, pause = store.add(key, 1), 0.01
    with told(missing):
        while arrived < len(ranks):
            time.sleep(pause)
            arrived, pause = store.add(key, 0), min(2 * pause, _LONGEST_PAUSE)


@contextlib.contextmanager
def working_first(first: bool, what: str) -> Iterator[None]:
    """Let the ranks with ``first`` run the code inside before the others; every rank must enter.

    After a few seconds ranks that wait say so. A rank without others says what it does.
    """
    if not first:
        wait_for_ranks(what)
    try:
        with told(what) if os.environ.get("WORLD_SIZE", "1") == "1" else contextlib.nullcontext():
            yield
    finally:
        if first:
            wait_for_ranks(what)
