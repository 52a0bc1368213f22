"""Run a launcher, and show what ended the ranks as the last line.

    python launchers/cluster/launch.py torch.distributed.run --nproc_per_node 2 launchers/finetune.py ...

A launcher's own report of a failed rank is long and does not have the cause. If a rank has left a line, it takes the
report's place. The launcher runs in this process, so that signals reach it, and its exit code is this one's.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path

if __spec__ is None:  # started as a file: go on as a module of the package, which has relative imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    runpy.run_module("launchers.cluster.launch", run_name="__main__", alter_sys=True)
    raise SystemExit

from ..screen.foreign import filter_foreign
from ..screen.lines import LAUNCH_FOLDER, left_for_last, show


def main() -> None:
    """Run the module that the first argument names with the other arguments, as ``python -m`` does."""
    module = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(prefix="reflora-launch-") as folder:
        os.environ[LAUNCH_FOLDER] = folder  # the ranks inherit it
        code = run_launcher(module, Path(folder))
    sys.exit(code)


def run_launcher(module: str, folder: Path) -> int | str | None:
    """Run a launcher's module to its end, show the line that a rank left in ``folder``, and return the exit code.

    Raises:
        BaseException: the launcher's own, if no rank left a line.
    """
    filter_foreign()
    code: int | str | None = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        if left_for_last(folder) is None:
            raise
        code = 1
    line = left_for_last(folder)
    if line is None and code:
        line = f"{module} ended with exit code {code}, and no rank left a line: see above", "error"
    if line is not None:
        show(*line)
    return code


if __name__ == "__main__":
    main()
