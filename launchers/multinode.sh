#!/usr/bin/env bash
# Start a job on several machines that have no scheduler.
#
# The same command on every machine but for --node-rank, which is 0 on the machine with the address given as --head:
#   bash launchers/multinode.sh LAUNCHER --nodes 2 --node-rank 0 --head 10.0.0.1 [CONFIG] [options of finetune.py]
# Or once, if ssh gets to every machine of a hostfile without a password (lines "HOST slots=GPUS", the head first):
#   bash launchers/multinode.sh deepspeed --hostfile FILE [CONFIG.json] [options of finetune.py]
#
#   LAUNCHER        deepspeed, accelerate or torchrun
#   CONFIG          *.json for deepspeed (ds_configs/zero3.json), *.yaml for accelerate (launchers/accelerate/fsdp2.yaml)
#   --script FILE   run this instead of launchers/finetune.py, for example benchmarks/overhead.py
#   --port P        29500; P is the launcher's on the head, at P + 1 the machines compare what has to be equal
#   --wait SECONDS  300; until all machines have to be there (not with a hostfile)
# PROCESSES=N sets the number of ranks of each machine (all GPUs); a hostfile has slots=N. Paths have to be the same on
# all machines, and --output_dir on storage that they share.
#
# Gloo and NCCL (for which "=" means exactly) talk through the interface that routes to the head. GLOO_SOCKET_IFNAME and
# NCCL_SOCKET_IFNAME, if set, name another; with a hostfile, the head's interface has to have the same name on all machines, unless they are set.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
answer_help launchers/finetune.py "$@"

usage() { die "$*; see the head of $0"; }
whole() { case "$2" in '' | *[!0-9]*) usage "$1 $2: give a whole number" ;; esac; }

launcher=${1:-}
case "$launcher" in
    deepspeed | accelerate | torchrun) shift ;;
    *) usage "the first argument is deepspeed, accelerate or torchrun, not '$launcher'" ;;
esac
nodes='' node_rank='' head='' hostfile='' script='' port=29500 wait=300
while [ $# -gt 0 ]; do
    case "$1" in
        --nodes | --node-rank | --head | --hostfile | --script | --port | --wait)
            [ $# -ge 2 ] || usage "option $1 needs a value" ;;
        *) break ;;
    esac
    case "$1" in
        --nodes) nodes=$2 ;;
        --node-rank) node_rank=$2 ;;
        --head) head=$2 ;;
        --hostfile) hostfile=$2 ;;
        --script) script=$2 ;;
        --port) port=$2 ;;
        --wait) wait=$2 ;;
    esac
    shift 2
done
whole --port "$port"
whole --wait "$wait"
if [ -n "$hostfile" ]; then
    [ "$launcher" = deepspeed ] || usage "--hostfile is the deepspeed launcher's; use --nodes, --node-rank and --head"
    [ -z "$nodes$node_rank" ] || usage "--hostfile takes the place of --nodes and --node-rank"
    [ -f "$hostfile" ] || die "--hostfile $hostfile does not exist"
else
    [ -n "$nodes" ] || usage "--nodes is missing: how many machines are there?"
    [ -n "$node_rank" ] || usage "--node-rank is missing: which of the $nodes machines is this, from 0 on?"
    [ -n "$head" ] || usage "--head is missing: the address of the machine with --node-rank 0, as the others reach it"
    whole --nodes "$nodes"
    whole --node-rank "$node_rank"
    [ "$node_rank" -lt "$nodes" ] || usage "--node-rank $node_rank is out of range: $nodes machines have ranks 0 to $((nodes - 1))"
fi
[ -z "$script" ] || [ -f "$script" ] || die "--script $script does not exist"

ensure_environment deepspeed,launchers
detect_devices
if [ "$launcher" = deepspeed ]; then require_compiler; fi

# What is run, and the launcher's configuration.
config='' arguments=()
case "$launcher" in
    deepspeed)
        if [ -z "$script" ]; then
            case "${1:-}" in
                *.json) config=$1; shift ;;
                *) config=$(default_deepspeed "$@") ;;
            esac
            arguments=(${config:+--deepspeed "$config"})
        fi ;;
    accelerate)
        config=$repository/launchers/accelerate/fsdp2.yaml
        [ "$gpus" -gt 0 ] || config=$repository/launchers/accelerate/deepspeed_zero3.yaml
        case "${1:-}" in *.yaml) config=$1; shift ;; esac
        if [ -f "$config" ]; then
            refuse_fsdp_on_a_cpu "$config"
            kind=$(accelerate_setting "$config" distributed_type) || exit 1
            [ "$kind" != DEEPSPEED ] || require_compiler
        fi ;;
esac
[ -z "$config" ] || [ -f "$config" ] || die "the configuration $config does not exist"
script=$(realpath "${script:-$repository/launchers/finetune.py}")
arguments+=("$@")

# Through a file without a name, so that nothing is left behind: exec leaves no shell that could remove it.
without_name() { local file; file=$(mktemp); cat > "$file"; exec 9< "$file"; rm "$file"; }

if [ -n "$hostfile" ]; then
    command -v pdsh > /dev/null \
        || die "pdsh is not installed (Debian: apt install pdsh); or start every machine with --nodes and --node-rank"
    mapfile -t hosts < <(sed -e 's/#.*//' "$hostfile" | awk 'NF {print $1}')
    for host in "${hosts[@]}"; do  # which go to ssh, and are no options
        [[ "$host" =~ ^[A-Za-z0-9_]([A-Za-z0-9_.:@-]*)$ ]] || die "--hostfile $hostfile: '$host' is no name of a machine"
    done
    [ ${#hosts[@]} -ge 2 ] || die "--hostfile $hostfile names ${#hosts[@]} machine(s); on one, use run_deepspeed.sh"
    for host in "${hosts[@]}"; do
        code=0
        echo "looking at $host (up to 60 s)"
        timeout 60 ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" "test -x '$PYTHON' && test -f '$script'" \
            || code=$?
        [ "$code" -ne 124 ] || die "$host does not answer within 60 s: is a file system with $PYTHON or $script away?"
        [ "$code" -ne 255 ] || die "ssh $host fails (see above): --hostfile $hostfile needs ssh without a password"
        [ "$code" -eq 0 ] || die "$host has no $PYTHON or no $script: paths have to be the same on all machines"
    done
    head=${head:-${hosts[0]}}
    interface=$(PYTHONPATH=$repository "$PYTHON" - "${hosts[1]}" "$port" <<'PY'
import sys
from launchers.cluster.meeting import route_to
print(route_to(sys.argv[1], int(sys.argv[2]), is_head=False)[0])
PY
    ) || exit 1
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
    # ssh passes no variables on; DeepSpeed sets those of a file, which takes the place of the user's own
    without_name < <(
        cat "$HOME/.deepspeed_env" .deepspeed_env 2> /dev/null || true
        env | grep -E '^(PATH|OMP_NUM_THREADS|DS_ACCELERATOR|(GLOO|NCCL|REFLORA)_[A-Z_]+|TOKENIZERS_PARALLELISM)=' || true
        env | grep -E '^(HF_HOME|HF_HUB_OFFLINE|TORCH_EXTENSIONS_DIR)=' || true
        env | grep -E '^(ACCELERATE_USE_PARALLELISM_CONFIG|PARALLELISM_CONFIG_[A-Z_]+)=' || true
    )
    quoted=()
    for argument in "${arguments[@]}"; do quoted+=("$(quoted_for_pdsh "$argument")"); done
    DS_ENV_FILE=/dev/fd/9 exec "$PYTHON" -m deepspeed.launcher.runner --log_level warning --hostfile "$hostfile" \
        --launcher pdsh --no_local_rank --master_addr "$head" --master_port "$port" "$script" "${quoted[@]}"
fi

found=$("$PYTHON" "$repository/launchers/cluster/meeting.py" --nodes "$nodes" --node_rank "$node_rank" --head "$head" \
    --port "$port" --wait "$wait" "launcher=$launcher" "processes=$PROCESSES" "script=$(basename "$script")") || exit 1
read -r interface address <<< "$found"
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
echo "machine $node_rank of $nodes: $PROCESSES process(es), $address on $GLOO_SOCKET_IFNAME, head $head:$port"

case "$launcher" in
    deepspeed)
        # what `deepspeed --no_ssh` starts on each machine, without the process between that would not pass SIGTERM on
        world=$(world_info "$nodes")
        launch deepspeed.launcher.launch --log_level warning --world_info "$world" \
            --node_rank "$node_rank" --master_addr "$head" --master_port "$port" --no_local_rank \
            "$script" "${arguments[@]}" ;;
    accelerate)
        set_mesh_options "$config" "$nodes"
        # its default for DeepSpeed on several machines is pdsh
        launch accelerate.commands.launch --config_file "$config" --num_machines "$nodes" \
            --machine_rank "$node_rank" --num_processes $((nodes * PROCESSES)) --main_process_ip "$head" \
            --main_process_port "$port" --deepspeed_multinode_launcher standard "${mesh_options[@]}" \
            "$script" "${arguments[@]}" ;;
    torchrun)
        # without --local_addr it would hand out the machine's name, which others may not know
        launch torch.distributed.run --nnodes "$nodes" --nproc_per_node "$PROCESSES" --rdzv_backend c10d \
            --rdzv_endpoint "$head:$port" --rdzv_id "reflora-$port" --rdzv_conf "is_host=$((node_rank == 0))" \
            --local_addr "$address" "$script" "${arguments[@]}" ;;
esac
