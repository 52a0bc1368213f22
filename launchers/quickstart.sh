#!/usr/bin/env bash
# From nothing to a comparison of LoRA and RefLoRA, with no download of models or data:
#   bash launchers/quickstart.sh [--steps N] [--pretrain-steps N] [--methods "lora reflora"]
#                                [--cache-dir DIR] [--output-dir DIR] [--processes N]
# About 7 minutes on two CPU cores once the packages are installed.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

steps=150
pretrain_steps=680
methods="lora reflora"
cache_dir=${REFLORA_CACHE:-$HOME/.cache/reflora_dist}
output_dir=outputs/quickstart
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "option $1 needs a value (or is unknown); see the head of $0"
    case "$1" in
        --steps) steps=$2 ;;
        --pretrain-steps) pretrain_steps=$2 ;;
        --methods) methods=$2 ;;
        --cache-dir) cache_dir=$2 ;;
        --output-dir) output_dir=$2 ;;
        --processes) PROCESSES=$2 ;;
        *) die "unknown option $1; see the head of $0" ;;
    esac
    shift 2
done
[ "$steps" -ge 2 ] 2>/dev/null || die "--steps $steps: give a whole number of at least 2"

start=$SECONDS
stage() { say "[$((SECONDS - start)) s] $*"; }

stage "1/5 environment"
ensure_environment deepspeed,launchers
detect_devices
require_compiler
echo "python $("$PYTHON" -c 'import platform; print(platform.python_version())') at $PYTHON," \
    "$gpus GPU(s), $PROCESSES processes of $OMP_NUM_THREADS thread(s)"

stage "2/5 embedded model and data, from the standard library's own text (about 2 minutes, then cached)"
"$PYTHON" "$repository/launchers/data/embedded.py" --cache-dir "$cache_dir" --pretrain-steps "$pretrain_steps"

# The published default of 100 warm-up steps would leave a short run plain LoRA for most of its length.
warmup=$((steps >= 50 ? 10 : 1))
runs=()
for method in $methods; do
    stage "3/5 fine-tuning with $method: $PROCESSES ranks of ZeRO-3, $steps steps"
    runs+=("$output_dir/$method")
    case "$method" in reflora | reflora-s | lora-pro) plain=$warmup ;; balora) plain=1 ;; *) plain=0 ;; esac
    case "$method" in
        # r x r numbers per layer; the first step that LoRA-SB starts from is a tenth of the peak, as after a warm-up
        lora-sb | lora-xs) options=(--lora_r 32 --lora_sb_learning_rate 1e-4) ;;
        *) options=(--lora_r 8 --lora_alpha 16 --reflora_warmup_steps "$plain") ;;
    esac
    "$PYTHON" -m deepspeed.launcher.runner --log_level warning --num_gpus "$PROCESSES" --master_port "$(free_port)" \
        "$repository/launchers/finetune.py" --deepspeed "$repository/ds_configs/zero3.json" \
        --method "$method" \
        --cache_dir "$cache_dir" --pretrain_steps "$pretrain_steps" --output_dir "$output_dir/$method" \
        --max_length 128 "${options[@]}" --learning_rate 1e-3 --lr_scheduler_type cosine \
        --per_device_train_batch_size 8 --max_steps "$steps" --logging_steps $((steps >= 50 ? 10 : 1)) \
        --eval_on_start True --eval_steps $((steps >= 10 ? steps / 5 : steps / 2)) --max_eval_records 200 \
        --per_device_eval_batch_size 25 --save_strategy no --seed 0 \
        || die "fine-tuning with $method failed; the messages above say why"
done

stage "4/5 comparison"
"$PYTHON" "$repository/launchers/compare.py" "${runs[@]}" --plot "$output_dir/comparison.png"

adapter=${runs[-1]}
stage "5/5 questions to the adapter in $adapter, reloaded with PEFT (a model this small guesses)"
"$PYTHON" "$repository/launchers/ask.py" --adapter "$adapter" \
    --question "What does the method queue.Queue.empty do?" --input "empty(self)"

stage "done"
