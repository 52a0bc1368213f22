#!/usr/bin/env bash
# Fine-tune through the deepspeed launcher: bash launchers/run_deepspeed.sh [CONFIG.json] [options of finetune.py]
# Without a config: ds_configs/zero3.json. PROCESSES=N sets the number of ranks.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
answer_help launchers/finetune.py "$@"
ensure_environment deepspeed,launchers
detect_devices
require_compiler
config=$repository/ds_configs/zero3.json
case "${1:-}" in *.json) config=$1; shift ;; esac
# What `deepspeed --num_gpus N` starts on each machine. Itself it would end at SIGTERM and leave the ranks running.
world=$(world_info 1)
leave_sigusr1_to_ranks
exec "$PYTHON" -m deepspeed.launcher.launch --log_level warning --world_info "$world" --master_addr 127.0.0.1 \
    --master_port "$(free_port)" "$repository/launchers/finetune.py" --deepspeed "$config" "$@"
