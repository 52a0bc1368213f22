#!/usr/bin/env bash
# Does a method train better than LoRA? The sweeps of benchmarks/README.md, "Does it train better?":
#   bash benchmarks/worth.sh [PART ...]      parts: r8 methods alpha r64 scaled sgd (all by default), and task
# A part goes on where it was stopped, seed by seed, and ends with its record. A run takes about two minutes of a CPU core;
# on a GPU several runs share it. SEEDS="0 1 2 3 4" sets the seeds, WORKERS the runs beside each other, and METHODS="lora
# reflora ..." the methods. Part task trains on DATA=FILE.json.
set -euo pipefail
. "$(dirname "$0")/../launchers/environment.sh"
answer_help "" "$@"
cd "$repository"
ensure_environment launchers

records=benchmarks/results/convergence
read -ra pair <<<"${METHODS:-lora reflora}"
read -ra few <<<"${METHODS:-lora reflora reflora+moments}"
read -ra methods <<<"${METHODS:-lora reflora reflora-s scaled-gd lora-pro lora-rite balora balora+moments lora-muon}"
# a method whose best rate lies elsewhere gets further rates
grid=(--learning_rates 5e-4 1e-3 2e-3 4e-3 8e-3 1.6e-2 --extend True)
common=(--model smollm2 --prompt_template plain --bf16 True --max_length 64 --max_eval_records 96
    --steps 40 --warmup_steps 5 --lr_warmup_steps 10 --batch_size 8 --eval_every 10 --timed_rounds 2)

# sweep NAME OPTION ... : one record
sweep() {
    local name=$1 seeds
    shift
    read -ra seeds <<<"${SEEDS:-0 1 2}"
    say "$name"
    "$PYTHON" benchmarks/convergence.py "${common[@]}" ${WORKERS:+--workers "$WORKERS"} "$@" \
        --seeds "${seeds[@]}" --output "$records/smollm2-$name.json"
}

parts=("$@")
[ $# -gt 0 ] || parts=(r8 methods alpha r64 scaled sgd)
for part in "${parts[@]}"; do
    tuned=() # the first record with a method gives its rate
    for name in r8 methods; do
        [ ! -f "$records/smollm2-$name.json" ] || tuned+=("$records/smollm2-$name.json")
    done
    case "$part" in
        r8) SEEDS=${SEEDS:-0 1 2 3 4} sweep r8 --methods "${few[@]}" "${grid[@]}" ;;
        methods) sweep methods --methods "${methods[@]}" "${grid[@]}" ;;
        alpha) sweep alpha --methods "${few[@]}" "${grid[@]}" --alphas 1 2 4 ;;
        r64) sweep r64 --methods "${few[@]}" --lora_rank 64 "${grid[@]}" --tuned_in "${tuned[@]}" ;;
        scaled) sweep scaled --methods "${methods[@]}" --start drawn --warmup_steps 0 --start_scales 1 0.1 10 \
            --only_tuned True --tuned_in "${tuned[@]}" ;;
        sgd) sweep sgd --methods "${pair[@]}" --optimizer sgd --extend True --learning_rates 0.03 0.06 0.12 0.25 0.5 1 ;;
        task)
            [ -n "${DATA:-}" ] || die "part task needs DATA, a JSON file of instructions and answers"
            sweep task --methods "${few[@]}" "${grid[@]}" --dataset "$DATA" --max_length 128 --batch_size 4 ;;
        *) die "unknown part $part; see the head of $0" ;;
    esac
done
