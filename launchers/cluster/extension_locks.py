"""Locks of torch's C++ extensions, which DeepSpeed builds at its first run: who holds them, and which nobody holds.

    python launchers/cluster/extension_locks.py          # removes those that an interrupted build left

torch creates a file ``lock`` beside what it builds, keeps it open, and removes it afterwards. A build that is killed
leaves it, and torch then waits for it for ever, in silence.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers.cluster.waiting import say, told

# of a lock whose process may be one of another machine or another user
ABANDONED_AFTER_SECONDS = 600.0
_LOCAL_FILESYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs"}
_POLL_SECONDS, _LOOKS_PER_SEARCH = 0.1, 20


def main() -> None:
    """Remove the locks that nobody holds, and say of the others that they will be waited for."""
    for lock in sorted(extensions_folder().rglob("lock")):
        description = describe(lock)
        if remove_abandoned(lock):
            print(f"removed a lock that an interrupted build left: {lock}", flush=True)
        elif lock.exists():
            print(f"DeepSpeed will wait for {description}", flush=True)


def extensions_folder() -> Path:
    """Where torch builds extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache).expanduser() / "torch_extensions")


def find_builder(lock: Path) -> int | None:
    """The process of this machine that has the lock open, or a ninja that goes on without it."""
    folder = os.path.realpath(lock.parent)

    def holds(opened: Path) -> bool:
        with contextlib.suppress(OSError):  # closed meanwhile
            return os.readlink(opened).endswith(f"/{lock.name}") and os.path.samefile(opened, lock)
        return False

    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            ninja = (process / "comm").read_text() == "ninja\n" and os.readlink(process / "cwd") == folder
            if int(process.name) != os.getpid() and (ninja or any(map(holds, (process / "fd").iterdir()))):
                return int(process.name)
    return None


def _is_local(path: Path) -> bool:
    """Whether it lies on a file system that no other machine writes to."""
    real = Path(os.path.realpath(path))
    mounted = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    # the last of those mounted at one place covers the others
    covering = sorted(mounted, key=lambda part: len(part.mountpoint))[-1:]
    return bool(covering) and covering[0].fstype in _LOCAL_FILESYSTEMS


def is_abandoned(lock: Path) -> bool:
    """Whether nobody builds under this lock; where that cannot be seen, whether it is old.

    Raises:
        FileNotFoundError: there is no lock any more.
    """
    if find_builder(lock) is not None:
        return False
    state = lock.stat()
    own = os.geteuid() in (0, state.st_uid) and Path("/proc/self/fd").exists()
    return (own and _is_local(lock)) or time.time() - state.st_mtime > ABANDONED_AFTER_SECONDS


def remove_abandoned(lock: Path) -> bool:
    """Remove the lock if nobody builds under it. Returns whether it was removed."""
    aside = lock.with_name(f"{lock.name}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        judged = lock.stat()
        if not is_abandoned(lock):
            return False
        os.rename(lock, aside)
        taken = aside.stat()
        same = (taken.st_ino, taken.st_mtime_ns) == (judged.st_ino, judged.st_mtime_ns)
        if not same:  # another process was faster, and builds: this is its lock
            with contextlib.suppress(FileExistsError):
                os.link(aside, lock)
        os.unlink(aside)
        return same
    return False


def describe(lock: Path) -> str:
    """Which build a lock is of, who runs it, and since when."""
    try:
        since = time.strftime("%H:%M:%S", time.localtime(lock.stat().st_mtime))
        builder = find_builder(lock)
    except OSError:
        return ""
    who = f"process {builder} began" if builder is not None else "another machine or user may have begun"
    return f"the build of {lock.parent.name} that {who} at {since} ({lock})"


class SpokenLock:
    """In place of torch's FileBaton: says whose build it waits for, and builds itself when that one has ended.

    torch's waits in silence while the file exists, and then loads what an interrupted build may not have made.
    """

    def __init__(self, lock_file_path: str, *args: Any, **kwargs: Any) -> None:
        self.path = Path(lock_file_path)
        self._held = contextlib.ExitStack()

    def try_acquire(self) -> bool:
        """Wait for the lock, and take it. Always true: a build that is up to date takes no time."""
        with told(lambda: f"waiting for {description}" if (description := describe(self.path)) else ""):
            looks = 0
            while not self._acquired():
                if looks % _LOOKS_PER_SEARCH == 0 and remove_abandoned(self.path):
                    say(f"removed a lock that an interrupted build left: {self.path}")
                    continue
                looks += 1
                time.sleep(_POLL_SECONDS)
        self._held.enter_context(told(f"compiling {self.path.parent.name}, kept for later runs in {self.path.parent}"))
        return True

    def _acquired(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        self._held.callback(self.path.unlink, missing_ok=True)
        self._held.callback(os.close, descriptor)
        return True

    def release(self) -> None:
        """Close and remove the file."""
        self._held.close()


def speak_while_building() -> None:
    """Have torch build extensions under :class:`SpokenLock`, in this process."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = SpokenLock  # type: ignore[misc, assignment]


if __name__ == "__main__":
    main()
