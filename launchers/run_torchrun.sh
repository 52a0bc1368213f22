#!/usr/bin/env bash
# Fine-tune under DDP through torchrun: bash launchers/run_torchrun.sh [options of finetune.py]
# PROCESSES=N sets the number of ranks.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
answer_help launchers/finetune.py "$@"
ensure_environment deepspeed,launchers
detect_devices
leave_sigusr1_to_ranks
exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$PROCESSES" --master_addr 127.0.0.1 \
    --master_port "$(free_port)" "$repository/launchers/finetune.py" "$@"
