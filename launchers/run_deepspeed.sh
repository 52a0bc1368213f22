#!/usr/bin/env bash
# Fine-tune through the deepspeed launcher: bash launchers/run_deepspeed.sh [CONFIG.json] [options of finetune.py]
# Without a config: ds_configs/zero3.json. PROCESSES=N sets the number of ranks.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
ensure_environment deepspeed,launchers
detect_devices
require_compiler
config=$repository/ds_configs/zero3.json
case "${1:-}" in *.json) config=$1; shift ;; esac
exec "$PYTHON" -m deepspeed.launcher.runner --log_level warning --num_gpus "$PROCESSES" --master_port "$(free_port)" \
    "$repository/launchers/finetune.py" --deepspeed "$config" "$@"
