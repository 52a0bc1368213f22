# Shared by the batch scripts in this folder; source it, then: run LAUNCHER "$@". It runs on the first node.
#
# SLURM sends USR1 to the batch script before the time limit (#SBATCH --signal), and before a preemption where
# PreemptParameters has send_user_signal. It is passed on to the ranks: finetune.py writes a checkpoint and ends, the
# job is queued again under the same number and goes on from there. After the failure of a node SLURM queues it again
# by itself (--requeue), and it goes on from the last checkpoint (--save_steps).

repository=${REFLORA_REPOSITORY:-$SLURM_SUBMIT_DIR}
. "$repository/launchers/environment.sh"

# NCCL says why it fails, and rides out an InfiniBand link that is away for some seconds (2^22 x 4 us, several times).
# multinode.sh sets NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, if they are not set, to the interface towards the first
# node; set them where the fast network is another (ib0), and NCCL_IB_HCA where not every adapter is for this traffic.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
export PYTHONFAULTHANDLER=1  # a rank that crashes shows where
# srun leaves the batch script's --cpus-per-task out, and ranks would share a single core
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
# torch's would count one rank per task, but a task is a launcher here
unset RANK WORLD_SIZE LOCAL_RANK

# One launcher on each node. Arguments: deepspeed, accelerate or torchrun; what the batch script was given.
run() {
    local launcher=$1 script=$repository/launchers/finetune.py arguments=() resumable='' code
    shift
    case "${1:-}" in *.py) script=$1; shift ;; esac
    [ -f "$script" ] || die "$script does not exist; submit from the repository, or set REFLORA_REPOSITORY to it"
    case "$script" in
        *launchers/finetune.py)
            resumable=yes
            case "${1:-}" in *.json | *.yaml) arguments=("$1"); shift ;; esac
            # finetune.py then goes on from the job's own checkpoint, if it has one, whatever its options say
            [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || export REFLORA_RESTARTED=$SLURM_RESTART_COUNT ;;
        *evaluate.py) resumable=yes ;;  # it leaves out what it has answered
    esac
    case "$script" in *launchers/finetune.py) ;; *) arguments=(--script "$script" "${arguments[@]}") ;; esac
    arguments+=("$@")
    ensure_environment deepspeed,launchers  # once, before all nodes look for it

    local nodes=${SLURM_JOB_NUM_NODES:-$SLURM_NNODES} port=${PORT:-$((20000 + SLURM_JOB_ID % 6000 * 2))} hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local head=${HEAD_ADDRESS:-${hosts%%$'\n'*}}
    # Debian has a machine's own name at 127.0.1.1, where no other gets to; this script runs on the first node
    case "$head" in
        127.*) ;;
        *) if getent ahostsv4 "$head" | grep -q '^127\.'; then head=$(hostname -I | cut -d ' ' -f 1); fi ;;
    esac
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $launcher on $nodes node(s), head $head:$port"

    warned='' interrupted=''
    trap 'warned=yes interrupted=yes; stop_ranks' USR1
    # shellcheck disable=SC2016  # the node's own number
    srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 \
        bash -c 'exec bash "$0" "$1" --nodes "$2" --node-rank "$SLURM_NODEID" "${@:3}"' \
        "$repository/launchers/multinode.sh" "$launcher" "$nodes" --head "$head" --port "$port" "${arguments[@]}" &
    step=$!
    while :; do  # a signal ends wait before the step has ended
        interrupted='' code=0
        wait "$step" || code=$?
        [ -n "$interrupted" ] || break
    done
    trap '' USR1
    if [ -z "$warned" ] || [ "$code" -eq 0 ]; then return "$code"; fi
    [ -n "$resumable" ] || die "the time is up, and $script could not go on where it was; give it a longer --time"
    # a job that never gets as far as a checkpoint would come back for ever
    [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_REQUEUES:-50}" ] || die "queued again ${SLURM_RESTART_COUNT} times; giving up"
    say "queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
}

# Send USR1 to the ranks on this node; finetune.py's ranks agree on the step to stop after, wherever it arrives.
# Not through srun: it signals launchers and data loaders as well, which would end at once.
stop_ranks() {
    local ranks pid parent ignored listening=()
    # what a launcher of this job has told which rank it is; the variables of a process are separated by NUL
    ranks=$(grep -lszx "SLURM_JOB_ID=$SLURM_JOB_ID" /proc/[0-9]*/environ | xargs -r grep -lsz '^RANK=' | cut -d / -f 3) \
        || true  # processes of others cannot be read
    for pid in $ranks; do
        parent=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2> /dev/null) || continue
        grep -qx "$parent" <<< "$ranks" && continue  # a data loader's worker
        # before and after training a rank ignores it, and so does a script that knows nothing of it
        ignored=$(awk '/^SigIgn:/ {print $2}' "/proc/$pid/status" 2> /dev/null) || continue
        (((16#${ignored:-0} >> 9) & 1)) && continue  # bit of signal 10
        listening+=("$pid")
    done
    # all were chosen before the first is gone and its workers have another parent; no rank: nobody would save
    kill -USR1 "${listening[@]}" 2> /dev/null || kill "$step" 2> /dev/null || true
}
