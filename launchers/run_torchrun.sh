#!/usr/bin/env bash
# Fine-tune under DDP through torchrun: bash launchers/run_torchrun.sh [SCRIPT.py] [options of the script]
# Without a script: launchers/finetune.py. PROCESSES=N sets the number of ranks.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
script=$repository/launchers/finetune.py
case "${1:-}" in *.py) script=$(realpath "$1"); shift ;; esac
answer_help "$script" "$@"
ensure_environment deepspeed,launchers
detect_devices
launch torch.distributed.run --nproc_per_node "$PROCESSES" --master_addr 127.0.0.1 \
    --master_port "$(free_port)" "$script" "$@"
