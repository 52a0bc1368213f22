#!/usr/bin/env bash
# Run the tests. Creates a virtual environment (.venv) with all that they need if none is active.
#
#   bash tests/run.sh --fast          tests that start no process, about 3 minutes on 2 cores: after a changed line
#   bash tests/run.sh                 a selection of engines and ranks, about 23 minutes: what CI runs
#   bash tests/run.sh --all-ranks     every engine on 2, 3 and 4 ranks
#   bash tests/run.sh -k zero3        further arguments go to pytest
set -euo pipefail
. "$(dirname "$0")/../launchers/environment.sh"
answer_help "" "$@"
ensure_environment deepspeed,launchers,dev
OMP_NUM_THREADS=1
detect_devices
require_compiler
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$repository"
# Files of tests run beside each other. Most start two ranks or more, so two at a time keep two cores busy.
case "$*" in
    "" | --all-ranks) set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@" ;;
    *--fast*) set -- --numprocesses logical --maxprocesses 4 --dist loadfile "$@" ;;
esac
exec "$PYTHON" -m pytest "$@"
