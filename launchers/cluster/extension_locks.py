"""Find and remove abandoned locks of torch's C++ extensions, which DeepSpeed builds at its first run.

    python launchers/cluster/extension_locks.py          # removes locks that an interrupted build left

torch creates a file ``lock`` beside the extension that it builds, keeps the file open, and removes it afterwards. A
killed build leaves the file, and the next one waits for it forever without a message.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    runpy.run_module("launchers.cluster.extension_locks", run_name="__main__", alter_sys=True)
    raise SystemExit

from .waiting import say, told

# for a lock that another machine or another user may hold
ABANDONED_AFTER_SECONDS = 600.0
_LOCAL_FILESYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs"}
_POLL_SECONDS, _LOOKS_PER_SEARCH = 0.1, 20


def main() -> None:
    """Remove the locks that no process holds, and print the locks that DeepSpeed will wait for."""
    for lock in sorted(extensions_folder().rglob("lock")):
        description = describe(lock)
        if remove_abandoned(lock):
            print(f"removed a lock that an interrupted build left: {lock}", flush=True)
        elif lock.exists():
            print(f"DeepSpeed will wait for {description}", flush=True)


def extensions_folder() -> Path:
    """Return the folder in which torch builds extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache).expanduser() / "torch_extensions")


def find_builder(lock: Path) -> int | None:
    """Return the process of this machine that has the lock open, or a ninja that outlived it; None if there is none."""
    folder = os.path.realpath(lock.parent)

    def holds(opened: Path) -> bool:
        with contextlib.suppress(OSError):  # the file was closed meanwhile
            return os.readlink(opened).endswith(f"/{lock.name}") and os.path.samefile(opened, lock)
        return False

    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            ninja = (process / "comm").read_text() == "ninja\n" and os.readlink(process / "cwd") == folder
            if int(process.name) != os.getpid() and (ninja or any(map(holds, (process / "fd").iterdir()))):
                return int(process.name)
    return None


def _is_local(path: Path) -> bool:
    """Return whether the path is on a file system that no other machine writes to."""
    import psutil  # of the extra "launchers"; a lock to judge is rare

    real = Path(os.path.realpath(path))
    mounted = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    # if several are mounted at one place, the last one covers the others
    covering = sorted(mounted, key=lambda part: len(part.mountpoint))[-1:]
    return bool(covering) and covering[0].fstype in _LOCAL_FILESYSTEMS


def is_abandoned(lock: Path) -> bool:
    """Return whether no process builds under this lock. If that cannot be seen, an old lock counts as abandoned.

    Raises:
        FileNotFoundError: the lock no longer exists.
    """
    if find_builder(lock) is not None:
        return False
    state = lock.stat()
    own = os.geteuid() in (0, state.st_uid) and Path("/proc/self/fd").exists()
    return (own and _is_local(lock)) or time.time() - state.st_mtime > ABANDONED_AFTER_SECONDS


def remove_abandoned(lock: Path) -> bool:
    """Remove the lock if no process builds under it. Return whether it was removed."""
    aside = lock.with_name(f"{lock.name}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        judged = lock.stat()
        if not is_abandoned(lock):
            return False
        os.rename(lock, aside)
        taken = aside.stat()
        same = (taken.st_ino, taken.st_mtime_ns) == (judged.st_ino, judged.st_mtime_ns)
        if not same:  # another process has taken the lock meanwhile and builds: put it back
            with contextlib.suppress(FileExistsError):
                os.link(aside, lock)
        os.unlink(aside)
        return same
    return False


def describe(lock: Path) -> str:
    """Describe the build that holds a lock: the extension, the process and its start. Empty if the lock is gone."""
    try:
        since = time.strftime("%H:%M:%S", time.localtime(lock.stat().st_mtime))
        builder = find_builder(lock)
    except OSError:
        return ""
    who = f"process {builder} began" if builder is not None else "another machine or user may have begun"
    return f"the build of {lock.parent.name} that {who} at {since} ({lock})"


class SpokenLock:
    """Replacement for torch's FileBaton that prints the build it waits for, and builds the extension afterwards.

    torch's FileBaton waits without a message while the file exists. Then it loads the extension, which an interrupted
    build may not have made.
    """

    def __init__(self, lock_file_path: str, *args: Any, **kwargs: Any) -> None:
        self.path = Path(lock_file_path)
        self._held = contextlib.ExitStack()

    def try_acquire(self) -> bool:
        """Wait for the lock and take it. Always return True: repeating a finished build takes no time."""
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
    """Make torch use :class:`SpokenLock` in this process."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = SpokenLock  # type: ignore[misc, assignment]


if __name__ == "__main__":
    argparse.ArgumentParser(prog="extension_locks.py", description=main.__doc__).parse_args()
    main()
