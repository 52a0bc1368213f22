"""Start a script on several ranks of this machine, for benchmarks that are one process themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def launch_ranks(script: Path, ranks: int, job: dict[str, Any]) -> dict[str, Any]:
    """Run ``script JOB RESULT`` on several ranks, in fresh processes. JOB and RESULT are JSON files.

    Args:
        script: the script; its first rank writes the result.
        ranks: the number of ranks.
        job: the script's input, JSON-ready.

    Returns:
        The content of RESULT.

    Raises:
        RuntimeError: a rank failed, or none wrote a result; the message has the end of the ranks' output.
    """
    with tempfile.TemporaryDirectory(prefix=f"{script.stem}-") as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, str(script), str(job_file), str(result_file)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # ranks share the cores
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode or not result_file.exists():
            raise RuntimeError(f"{script.name} on {ranks} ranks failed ({done.returncode}):\n{done.stdout[-4000:]}")
        return json.loads(result_file.read_text())
