#!/usr/bin/env bash
# What needs a GPU, in at most 9 minutes on one: the benchmarks at real sizes, then tests/gpu/test_gpu.py in what is left.
#
#   bash benchmarks/gpu.sh              records go to benchmarks/results
#   bash benchmarks/gpu.sh DIR          ... to DIR
#   PYTHON=... bash benchmarks/gpu.sh   with another interpreter; SECONDS_IN_ALL=... in another time
#
# Needs what the package needs, and for the tests pytest, pytest-timeout, hypothesis and psutil; those of engines
# (tests/gpu/test_gpu_engines.py) are left to tests/run.sh, since they need DeepSpeed and TRL. A part that fails or takes too
# long does not stop the others; the exit code is then 1, and the last lines name it.
set -uo pipefail
case "${1:-}" in -h | --help) exec sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0" ;; esac
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
folder=${1:-benchmarks/results}
seconds=${SECONDS_IN_ALL:-540}
failed=()
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# all ranks are on this machine
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}

gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")')
[ -n "$gpu" ] || { echo "error: $PYTHON sees no GPU" >&2; exit 1; }
# "NVIDIA H100 80GB HBM3" -> h100
hardware=$(echo "$gpu" | tr '[:upper:]' '[:lower:]' | sed -E 's/^nvidia //; s/[^a-z0-9].*//')_$(date +%Y%m)

# part NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, or what is left.
part() {
    local name=$1 limit=$2 left=$((seconds - SECONDS)) start=$SECONDS code=0
    shift 2
    printf '\n=== %s\n' "$name"
    if [ "$left" -lt 5 ]; then
        echo "no time left"
        failed+=("$name (no time left)")
        return
    fi
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" || code=$?
    [ "$code" -eq 0 ] || failed+=("$name (exit code $code)")
    echo "--- $name: $((SECONDS - start)) s, exit code $code"
}

# benchmark NAME LIMIT SCRIPT ARGUMENTS...: in one process; NAME begins with the model's.
benchmark() {
    local name=$1 limit=$2 script=$3
    shift 3
    part "$script $name" "$limit" "$PYTHON" "benchmarks/$script.py" "$@" \
        --output "$folder/$script/${name}_$hardware.json"
}

# shared NAME RANKS LIMIT ARGUMENTS...: the sharded path, several ranks on the one GPU.
shared() {
    local name=$1 ranks=$2 limit=$3
    shift 3
    OMP_NUM_THREADS=1 part "overhead $name" "$limit" "$PYTHON" -m torch.distributed.run --nproc-per-node "$ranks" \
        benchmarks/overhead.py --engine fsdp2 --backend gloo "$@" --output "$folder/overhead/${name}_$hardware.json"
}

# what is asked for first comes first
benchmark 7b 80 overhead --model 7b --lora_ranks 16 32 --steps 20 --block_seconds 0.5 \
    --variants reflora reflora-s loop
benchmark 7b 160 throughput --model 7b --blocks 5 --variants reflora loop
shared 7b-2ranks 2 45 --model 7b --num_layers 4 --flat --variants reflora gather-coalesced --breakdown --blocks 4
shared 7b-4ranks 4 45 --model 7b --num_layers 4 --flat --variants reflora gather-coalesced --breakdown --blocks 4
benchmark 7b-lora-ranks 80 overhead --model 7b --lora_ranks 8 16 32 64 128 --variants reflora reflora-s \
    --blocks 3 --steps 20 --block_seconds 0.4 --breakdown
benchmark 7b-methods 45 overhead --model 7b --lora_ranks 16 --steps 20 --block_seconds 0.5 --blocks 3 \
    --variants reflora scaled-gd lora-pro lora-rite lora-muon riemannian
benchmark 8b 45 overhead --model 8b --lora_ranks 16 --steps 20 --block_seconds 0.5 --blocks 4 \
    --variants reflora reflora-s loop
benchmark 70b 45 overhead --model 70b --lora_ranks 16 --steps 20 --block_seconds 0.5 --blocks 3 \
    --variants reflora reflora-s loop
benchmark 1b 30 overhead --model 1b --lora_ranks 16 --steps 20 --block_seconds 0.5 --blocks 3 \
    --variants reflora reflora-s loop
benchmark 8b 100 throughput --model 8b --blocks 3 --variants reflora loop
part "tests" 120 "$PYTHON" -m pytest tests/gpu/test_gpu.py -q

printf '\n=== %s s in all, records in %s\n' "$SECONDS" "$folder"
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
