#!/usr/bin/env bash
# Fine-tune through the deepspeed launcher: bash launchers/run_deepspeed.sh [CONFIG.json] [options of finetune.py]
# Without CONFIG.json: that of the file of --config, else ds_configs/zero3.json. PROCESSES=N sets the number of ranks.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
answer_help launchers/finetune.py "$@"
ensure_environment deepspeed,launchers
detect_devices
require_compiler
case "${1:-}" in
    *.json) config=$1; shift ;;
    *) config=$(default_deepspeed "$@") ;;
esac
# What `deepspeed --num_gpus N` starts on each machine. Itself it would end at SIGTERM and leave the ranks running.
world=$(world_info 1)
launch deepspeed.launcher.launch --log_level warning --world_info "$world" --master_addr 127.0.0.1 \
    --master_port "$(free_port)" "$repository/launchers/finetune.py" ${config:+--deepspeed "$config"} "$@"
