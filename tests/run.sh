#!/usr/bin/env bash
# Run the tests. Creates a virtual environment (.venv) with all that they need if none is active.
#
#   bash tests/run.sh                 one selection of engines and ranks: what CI runs
#   bash tests/run.sh --all-ranks     every engine on 2, 3 and 4 ranks
#   bash tests/run.sh -k zero3        further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        echo "No virtual environment is active: creating .venv"
        "${PYTHON:-python3}" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
if ! python -c "import torch" 2>/dev/null; then
    # First and on its own: as a dependency, pip may choose a build for another accelerator.
    echo "Installing torch"
    python -m pip install -q -c constraints.txt torch
fi
if ! python -c "import reflora_dist, deepspeed, datasets, sentencepiece, pytest, hypothesis" 2>/dev/null; then
    echo "Installing reflora_dist and the packages of its tests (constraints.txt: the tested versions)"
    python -m pip install -q -c constraints.txt -e ".[deepspeed,launchers,dev]"
fi

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if ! python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    export DS_ACCELERATOR=cpu
fi
exec python -m pytest "$@"
