# Shared by the scripts in this folder; source it. Sets PYTHON, PROCESSES and the variables of CPU runs.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}

say() { printf '\n=== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# If the help is asked for: print the head of the calling script, and the help of a Python script that gets the further
# options, and leave. It comes first in every script, so that nothing is made or installed for it.
# Arguments: the Python script, or an empty one; the command line.
answer_help() {
    local script=$1 argument python=$PYTHON
    shift
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        python=python
    elif [ -x "$repository/.venv/bin/python" ]; then
        python=$repository/.venv/bin/python
    fi
    for argument in "$@"; do
        case "$argument" in
            -h | --help | --help-all)
                sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
                [ -n "$script" ] || exit 0
                echo
                cd "$repository"  # a script of ours is named from there, another by its whole path
                exec "$python" "$script" "$argument" ;;
        esac
    done
}

# Create .venv unless a virtual environment is active, and install what is missing.
# Arguments: the package's extras that are needed, separated by commas.
ensure_environment() {
    local extras=$1 constraints=()
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        if [ ! -x "$repository/.venv/bin/python" ]; then
            say "No virtual environment is active: creating $repository/.venv"
            "$PYTHON" -m venv "$repository/.venv" \
                || die "python -m venv failed; install your system's venv package (Debian: python3-venv)"
        fi
        # shellcheck disable=SC1091
        . "$repository/.venv/bin/activate"
    fi
    PYTHON=$(command -v python) || die "the active environment has no python"
    [ -f "$repository/constraints.txt" ] && constraints=(-c "$repository/constraints.txt")
    if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        say "Installing torch (TORCH_INDEX_URL names another index, for example that of the CPU builds)"
        "$PYTHON" -m pip install "${constraints[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
    fi
    local pins
    pins=$(mktemp)
    if ! missing_packages "$extras" >"$pins"; then
        say "Installing reflora_dist with [$extras]"
        "$PYTHON" -m pip install -c "$pins" -e "${repository}[$extras]"
    fi
    rm -f "$pins"
}

# Fails if a package is missing or too old, and then prints the versions of constraints.txt of all but those packages that
# are there and will do: a CUDA build of torch is not replaced because something else is missing.
missing_packages() {
    "$PYTHON" - "$repository" "$1" <<'PY'
import sys, tomllib
from importlib import metadata
from pathlib import Path
try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:  # a new environment, which has nothing but pip
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}

repository, extras = Path(sys.argv[1]), sys.argv[2].split(",")
project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + [r for extra in extras for r in project["optional-dependencies"][extra]]
wanted = [requirement for requirement in map(Requirement, wanted) if not requirement.marker or requirement.marker.evaluate()]
wanted = {canonicalize_name(requirement.name): requirement.specifier for requirement in wanted}
missing = {name for name, versions in wanted.items() if name not in installed or installed[name] not in versions}
constraints = repository / "constraints.txt"
for line in constraints.read_text().splitlines() if constraints.is_file() else []:
    name = canonicalize_name(line.partition("==")[0])
    if name in missing or name not in installed:
        print(line)
sys.exit(bool(missing))
PY
}

# Processes, threads and accelerator of a launch: all GPUs, or two processes on the CPU. PROCESSES overrides.
detect_devices() {
    # torch takes seconds to import, and says in a file of its own whether it was built for GPUs at all
    gpus=$("$PYTHON" - <<'PY'
import importlib.util, runpy
from pathlib import Path
built_for = runpy.run_path(str(Path(importlib.util.find_spec("torch").origin).parent / "version.py"))
if built_for.get("cuda") or built_for.get("hip"):
    import torch
    print(torch.cuda.device_count())
else:
    print(0)
PY
    )
    if [ "$gpus" -eq 0 ]; then
        local cores
        cores=$(getconf _NPROCESSORS_ONLN)
        PROCESSES=${PROCESSES:-2}
        export DS_ACCELERATOR=cpu
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > PROCESSES ? cores / PROCESSES : 1))}
    else
        PROCESSES=${PROCESSES:-$gpus}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
}

# DeepSpeed compiles a small shared-memory extension at its first run on a CPU. One that is interrupted while it does
# leaves a lock, for which all later runs would wait for ever.
require_compiler() {
    "$PYTHON" "$repository/launchers/cluster/extension_locks.py"
    [ "$gpus" -gt 0 ] || command -v c++ >/dev/null || command -v g++ >/dev/null \
        || die "DeepSpeed compiles a small extension for the CPU and finds no C++ compiler; install g++"
}

# What a file of YAML or JSON, such as an accelerate configuration, says under a key, in capitals; empty if it does not
# have the key. Arguments: file, key.
accelerate_setting() {
    "$PYTHON" - "$1" "$2" <<'PY'
import sys, yaml
path, key = sys.argv[1:]
try:
    with open(path) as file:
        content = yaml.safe_load(file)  # which reads JSON, too
except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
    sys.exit(f"error: {path} cannot be read: {str(error).splitlines()[0]}")
if not isinstance(content, dict):
    sys.exit(f"error: {path} holds no settings: it is no configuration of accelerate")
value = content.get(key)
print("" if value is None else str(value).upper())
PY
}

# DeepSpeed's configuration where the command line begins with none; empty if the file of --config names one itself.
# Arguments: the options of finetune.py.
default_deepspeed() {
    local file=''
    while [ $# -gt 0 ]; do
        case "$1" in --config) file=${2:-} ;; --config=*) file=${1#*=} ;; esac
        shift
    done
    [ -f "$file" ] || file=$repository/launchers/examples/$file.yaml
    if [ -f "$file" ] && [ -n "$(accelerate_setting "$file" deepspeed)" ]; then return; fi
    echo "$repository/ds_configs/zero3.json"
}

# Argument: accelerate's configuration.
refuse_fsdp_on_a_cpu() {
    local kind
    kind=$(accelerate_setting "$1" distributed_type) || exit 1
    if [ "$gpus" -eq 0 ] && [ "$kind" = FSDP ]; then
        die "$1: accelerate has no FSDP on a CPU (it would silently run DDP); use deepspeed_zero3.yaml"
    fi
}

# The machines and devices that deepspeed.launcher.launch starts ranks on. It replaces CUDA_VISIBLE_DEVICES by them.
# Argument: number of machines.
world_info() {
    "$PYTHON" - "$1" "$PROCESSES" "$gpus" <<'PY'
import base64, json, os, sys
nodes, processes, gpus = map(int, sys.argv[1:])
visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
devices = visible[:processes] if gpus and visible else list(range(processes))
if len(devices) < processes:
    sys.exit(f"error: PROCESSES={processes}, but CUDA_VISIBLE_DEVICES={','.join(visible)} are {len(visible)}")
world = {f"node{node}": devices for node in range(nodes)}
print(base64.urlsafe_b64encode(json.dumps(world).encode()).decode())
PY
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Sets mesh_options, the sizes that accelerate needs for a configuration with a mesh. Ranks that share sequences make
# groups. Otherwise each machine holds a copy, and a single machine holds two. Arguments: the configuration, number of
# machines.
set_mesh_options() {
    local copies=$(($2 > 1 ? $2 : 2)) ranks=$(($2 * PROCESSES)) sizes context sequence
    mesh_options=()
    sizes=$(accelerate_setting "$1" parallelism_config) || exit 1
    [ -n "$sizes" ] || return 0
    context=$(sed -n "s/.*_CP_SIZE': *'\{0,1\}\([0-9]*\).*/\1/p" <<< "$sizes")
    sequence=$(sed -n "s/.*_SP_SIZE': *'\{0,1\}\([0-9]*\).*/\1/p" <<< "$sizes")
    if [ "${context:-1}" -gt 1 ] || [ "${sequence:-1}" -gt 1 ]; then
        local group=$((${context:-1} * ${sequence:-1}))
        [ $((ranks % group)) -eq 0 ] || die "$1: $ranks process(es) cannot share sequences by $group"
        mesh_options=(--parallelism_config_dp_shard_size "$((ranks / group))")
        [ "${sequence:-1}" -eq 1 ] || mesh_options=(--parallelism_config_dp_replicate_size "$((ranks / group))")
        return
    fi
    [ $((ranks % copies)) -eq 0 ] && [ $((ranks / copies)) -gt 1 ] \
        || die "$1: $ranks process(es) do not make $copies copies of at least two shards each; use fsdp2.yaml"
    mesh_options=(--parallelism_config_dp_replicate_size "$copies")
    mesh_options+=(--parallelism_config_dp_shard_size "$((ranks / copies))")
}

# Print an argument in such a way that DeepSpeed's pdsh runner and the remote shell leave it as it is. The runner puts an
# argument with a space between double quotes and escapes those in it; others it hands to the shell bare.
quoted_for_pdsh() {
    case "$1" in
        *' '*) sed 's/[\\$`]/\\&/g' <<< "$1" ;;
        *) printf '%q' "$1" ;;
    esac
}

# Become the launcher whose module is the first argument; what ended a rank is the last line. Schedulers send SIGUSR1 to
# every process of a job: finetune.py stops with a checkpoint, and launchers, which would just end, ignore it.
launch() {
    echo "starting $PROCESSES process(es) with $1"
    trap '' USR1
    exec "$PYTHON" -u "$repository/launchers/cluster/launch.py" "$@"
}
