#!/usr/bin/env bash
# Fine-tune through accelerate: bash launchers/run_accelerate.sh [CONFIG.yaml] [options of finetune.py]
# Without a config: launchers/accelerate/fsdp2.yaml on GPUs; on a CPU deepspeed_zero3.yaml, because accelerate
# runs FSDP on accelerators only. PROCESSES=N sets the number of ranks.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
answer_help launchers/finetune.py "$@"
ensure_environment deepspeed,launchers
detect_devices
config=$repository/launchers/accelerate/fsdp2.yaml
[ "$gpus" -gt 0 ] || config=$repository/launchers/accelerate/deepspeed_zero3.yaml
case "${1:-}" in *.yaml) config=$1; shift ;; esac
refuse_fsdp_on_a_cpu "$config"
kind=$(accelerate_setting "$config" distributed_type) || exit 1
[ "$kind" != DEEPSPEED ] || require_compiler
set_mesh_options "$config" 1
leave_sigusr1_to_ranks
exec "$PYTHON" -m accelerate.commands.launch --config_file "$config" --num_processes "$PROCESSES" \
    --main_process_port "$(free_port)" "${mesh_options[@]}" "$repository/launchers/finetune.py" "$@"
