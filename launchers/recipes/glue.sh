#!/usr/bin/env bash
# DeBERTaV3-base on a task of GLUE, as in Table 2 of RefLoRA (NeurIPS 2025):
#   bash launchers/recipes/glue.sh cola|sst2|mrpc|stsb|qqp|mnli|qnli|rte [--method reflora] [--engine ddp|zero3]
#       [--weights NAME_OR_PATH] [--train-data FILE] [--eval-data FILE] [--output-dir DIR] [--processes N] [--seed N]
#       [-- further options of finetune.py, which win]
# Without --train-data and --eval-data the task comes from the hub (nyu-mll/glue). --train-data alone needs
# "-- --eval_fraction F", or "-- --eval_strategy no" to train without evaluations.
#
# Of RefLoRA's hyperparameters only those of CoLA are in the published code (github.com/zhangyilang/RefLoRA,
# NLU/debertaV3-base.sh); the table of the paper's appendix was not at hand. For the other tasks learning rate, epochs,
# warm-up, dropout, weight decay and length are those that AdaLoRA published for the same model
# (github.com/QingruZhang/AdaLoRA, NLU/scripts), not tuned for RefLoRA. The rest is CoLA's for all: r = 8, alpha = 8,
# no dropout in front of A, batches of 32, 100 steps before the first refactoring, the layers below.
# Unlike there, the pooler, which the checkpoint does not have either, is trained beside the classifier.
set -euo pipefail
. "$(dirname "$0")/../environment.sh"
answer_help launchers/finetune.py "$@"

task=${1:-}
case "$task" in
    # learning rate, epochs, warm-up (steps, or below 1 the share of all), dropout of the classifier, decay, length
    cola) set -- 1e-3 5 100 0.15 0 64 "${@:2}" ;;
    mnli) set -- 5e-4 7 1000 0.15 0 256 "${@:2}" ;;
    mrpc) set -- 1e-3 30 0.1 0 0.01 320 "${@:2}" ;;
    qnli) set -- 5e-4 5 500 0.1 0.01 512 "${@:2}" ;;
    qqp) set -- 8e-4 5 2000 0.15 0.01 320 "${@:2}" ;;
    rte) set -- 1.2e-3 50 200 0.2 0.01 320 "${@:2}" ;;
    sst2) set -- 8e-4 24 1000 0 0.01 128 "${@:2}" ;;
    stsb) set -- 2.2e-3 25 100 0.2 0.1 128 "${@:2}" ;;
    *) die "first argument '$task': give cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte" ;;
esac
learning_rate=$1 epochs=$2 warmup=$3 cls_dropout=$4 weight_decay=$5 max_length=$6
shift 6
method=reflora engine=ddp weights=microsoft/deberta-v3-base output_dir="" seed=0 data=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ $# -ge 2 ] || die "option $1 needs a value (or is unknown); see the head of $0"
    case "$1" in
        --method) method=$2 ;;
        --engine) engine=$2 ;;
        --weights) weights=$2 ;;
        --train-data) data+=(--dataset "$2") ;;
        --eval-data) data+=(--eval_dataset "$2") ;;
        --output-dir) output_dir=$2 ;;
        --processes) export PROCESSES=$2 ;;
        --seed) seed=$2 ;;
        *) die "unknown option $1; see the head of $0, and put options of finetune.py behind --" ;;
    esac
    shift 2
done
[ $# -eq 0 ] || shift
case "$engine" in
    ddp) launch=("$repository/launchers/run_torchrun.sh") ;;
    zero3) launch=("$repository/launchers/run_deepspeed.sh" "$repository/ds_configs/zero3.json") ;;
    *) die "--engine $engine: give ddp or zero3" ;;
esac
ensure_environment deepspeed,launchers
detect_devices
[ "$PROCESSES" -le 32 ] && [ $((32 % PROCESSES)) -eq 0 ] \
    || die "$PROCESSES processes do not divide the batch of 32; set --processes to 1, 2, 4, 8, 16 or 32"

say "$task: $weights with $method on $PROCESSES processes of $engine"
exec bash "${launch[@]}" --task seq-cls --glue_task "$task" --model "$weights" "${data[@]}" \
    --method "$method" --reflora_warmup_steps 100 --lora_r 8 --lora_alpha 8 \
    --target_modules query_proj key_proj value_proj output.dense intermediate.dense \
    --learning_rate "$learning_rate" --lr_scheduler_type linear --warmup_steps "$warmup" --num_train_epochs "$epochs" \
    --weight_decay "$weight_decay" --cls_dropout "$cls_dropout" --max_length "$max_length" \
    --per_device_train_batch_size $((32 / PROCESSES)) --eval_strategy epoch --save_strategy no --logging_steps 20 \
    --seed "$seed" --output_dir "${output_dir:-outputs/glue/$task-$method-seed$seed}" "$@"
